"""The data, the loss, the optimizer, the training loop and what it leaves behind."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ddpm

T, LOW, HIGH = 100, 1e-3, 0.15
BARS = np.cumprod(1 - np.linspace(LOW, HIGH, T))


class Grey(nn.Module):
    """Knows that all images are grey, -0.5 all over: only wrong by 1 + t / T, in the noise or v."""

    def __init__(self, predicts_v):
        super().__init__()
        self.predicts_v = predicts_v

    def forward(self, x, t):
        bar, error = torch.from_numpy(BARS)[t].view(-1, 1, 1, 1), 1 + t.view(-1, 1, 1, 1) / T
        eta = (x + 0.5 * bar.sqrt()) / (1 - bar).sqrt()
        v = bar.sqrt() * eta + 0.5 * (1 - bar).sqrt()
        return error + (v if self.predicts_v else eta)


class Recorder(nn.Module):
    """Predicts v to be 0, and keeps the steps and labels that it was asked for."""

    n_classes = 10
    predicts_v = True

    def forward(self, x, t, label=None):
        self.t, self.label = t, label
        return torch.zeros_like(x)


class Constant(nn.Module):
    """Predicts the same noise everywhere: one weight to learn, and another that does nothing."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(3.0))
        self.other = nn.Parameter(torch.tensor(0.0))
        self.n_images = 0

    def forward(self, x, t):
        self.n_images += len(x)
        return (self.noise + 0 * self.other).expand_as(x)


class Usual(nn.Sequential):
    """A network of the usual kind: (x, t) and no label, with dropout and batch norm."""

    def __init__(self):
        last = nn.Conv2d(4, 1, 3, padding=1)
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(), last)

    def forward(self, x, t):
        return super().forward(x)


def loss_of(network, x0, label=None):
    return ddpm.denoising_loss(ddpm.MyDDPM(network, T, LOW, HIGH), x0, label)


def test_data_are_images_and_labels(digits):
    images, labels = digits.tensors
    assert images.shape[1:] == (1, 28, 28) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.tolist()[:5] == [5, 0, 4, 1, 9]
    test_images, test_labels = ddpm.load_data(fashion=True, train=False).tensors
    assert len(test_images) == len(test_labels) == 10_000
    assert test_labels.bincount().tolist() == [1000] * 10


def test_steps_are_drawn_by_their_density_and_a_tenth_of_the_labels_is_dropped():
    """One t in each of n parts of the range: no share of the steps is off by more than one."""
    network, roots, labels = Recorder(), np.sqrt(BARS), torch.arange(200_000) % 10
    loss_of(network, torch.zeros(5000, 1, 1, 1))
    counts = np.cumsum(np.bincount(network.t, minlength=T))
    assert np.abs(counts - 5000 * np.cumsum(roots) / roots.sum()).max() < 1.05
    assert abs(np.corrcoef(network.t, np.arange(5000))[0, 1]) < 0.1
    loss_of(network, torch.zeros(200_000, 1, 1, 1), labels)
    dropped = network.label == 10
    assert abs(dropped.double().mean() - 0.1) < 0.003
    assert torch.equal(network.label[~dropped], labels[~dropped])


@pytest.mark.parametrize("predicts_v", [True, False])
def test_loss_is_the_mean_error_of_the_noise_over_all_steps(predicts_v):
    """However often each is drawn."""
    loss = loss_of(Grey(predicts_v), torch.full((100_000, 1, 2, 3), -0.5))
    squares = (1 + np.arange(T) / T) ** 2
    expected = (squares * BARS if predicts_v else squares).mean()
    assert loss.item() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 4, 4)])
def test_orthogonalize_is_the_quintic_iteration(shape):
    matrices = torch.randn(shape) * torch.logspace(0, -2, shape[-1])
    x = matrices.double() / matrices.double().flatten(1).norm(dim=1).view(-1, 1, 1)
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * (x @ x.mT) @ x + 2.0315 * (x @ x.mT) @ (x @ x.mT) @ x
    torch.testing.assert_close(ddpm.orthogonalize(matrices).double(), x, atol=1e-4, rtol=1e-4)
    assert not ddpm.orthogonalize(torch.zeros(shape)).any()


def test_muon_is_the_librarys():
    """Up to bf16, in which the library rounds; a convolution is a matrix; rates of groups change."""
    torch.manual_seed(0)
    shapes = [(24, 8), (24, 8), (8, 24), (6, 4, 3, 3), (32, 4, 2, 2)]
    ours = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    theirs = [nn.Parameter(torch.zeros(shape).flatten(1)) for shape in shapes]
    ours[3].data = ours[3].data.to(memory_format=torch.channels_last)
    idle = nn.Parameter(torch.ones(24, 8))  # has no gradient
    our_muon = ddpm.Muon([{"params": ours[:1]}, {"params": [*ours[1:], idle]}], 0.1)
    their_groups = [{"params": theirs[:1]}, {"params": theirs[1:]}]
    their_muon = torch.optim.Muon(their_groups, 0.1, ns_steps=3, weight_decay=0)
    for k in range(6):
        for our, their in zip(ours, theirs, strict=True):
            their.grad = torch.randn(their.shape) * torch.logspace(0, -2, their.shape[1])
            our.grad = torch.empty_like(our).copy_(their.grad.view(our.shape))
        for muon in (our_muon, their_muon):
            muon.param_groups[1]["lr"] = 0.02 * k
            muon.step()
    for our, their in zip(ours, theirs, strict=True):
        assert (our.flatten(1) - their).norm() < 0.01 * their.norm()
    assert (idle == 1).all()


@pytest.mark.parametrize("shape, lr", [((3,), 0.1), ((3, 3), 0), ((3, 3), -1), ((3, 3), np.nan)])
def test_muon_refuses_vectors_and_rates(shape, lr):
    with pytest.raises(ddpm.BadInput, match="vectors|lr"):
        ddpm.Muon([nn.Parameter(torch.ones(shape))], lr)


@pytest.mark.parametrize("n_epochs", [1, 3])
def test_each_step_of_the_training(n_epochs, train, monkeypatch):
    """Rates rise and fall; they and the gradients move the weights."""
    network, rates, weights, each_loss = Constant(), [], [], []
    groups = [{"params": [network.noise]}, {"params": [network.other], "lr": 1e-3}]
    optim = torch.optim.SGD(groups, 0.1)
    denoising_loss = ddpm.denoising_loss

    def loss_that_is_kept(*arguments):
        loss = denoising_loss(*arguments)
        each_loss.append(loss.item())
        return loss

    def keep(*_):
        rates.append([group["lr"] for group in optim.param_groups])
        weights.append(network.noise.item())

    monkeypatch.setattr(ddpm, "denoising_loss", loss_that_is_kept)
    optim.register_step_post_hook(keep)
    _, losses, path = train(n_epochs, network, optim=optim)
    passed = (np.arange(20 * n_epochs) + 0.5) / 20 / n_epochs
    factors = np.minimum(passed / 0.05, 1 - passed)
    np.testing.assert_allclose(rates, np.outer(factors, [0.1, 1e-3]), rtol=1e-6)
    np.testing.assert_allclose(weights, 3 * np.cumprod(1 - 0.2 * factors), atol=0.02)
    assert ddpm.load_model(path, network=Constant()).network.noise == network.noise
    assert losses == pytest.approx(np.reshape(each_loss, (n_epochs, 20)).mean(1), rel=1e-5)


def test_an_epoch_tells_how_far_it_is(images):
    """The mean loss is but a number: it must not keep the memory of all steps so far."""
    model = ddpm.MyDDPM(Constant())
    optim = torch.optim.SGD(model.parameters(), 0.1)
    told = list(ddpm.train_epoch(model, DataLoader(images, 40), optim, 1, 1))
    assert [n for n, _ in told] == [40, 40, 20]
    assert all(loss.isfinite() and not loss.requires_grad for _, loss in told)


def test_it_learns_and_is_reproducible(train, digits):
    dataset = TensorDataset(*digits[:150])
    (one, losses, _), (two, same_losses, _) = train(2, dataset=dataset), train(2, dataset=dataset)
    assert losses[1] < losses[0] and losses == same_losses
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("network", [Usual, ddpm.MyUNet])
def test_any_network_learns_and_draws(network, labelled, digits, tmp_path):
    """The report's loader yields lists [x0, label], or only [x0]."""
    data = digits[:100] if labelled else digits[:100][:1]
    model, path = ddpm.MyDDPM(network()), tmp_path / "a.pt"
    before = [p.clone() for p in model.parameters()]
    loader = DataLoader(TensorDataset(*data), 50, shuffle=True)
    optim = torch.optim.Adam(model.parameters(), 0.01)
    ddpm.training_loop(model, loader, 1, optim, None, True, path)
    assert not all(map(torch.equal, before, model.parameters()))
    assert path.with_name("a_10.png").exists()
    models = [model, ddpm.load_model(path, network=network())]
    assert all(each.n_classes == 10 * (labelled and network is ddpm.MyUNet) for each in models)
    one, two = (ddpm.generate_new_images(each, 2, gif_name=None, sample_steps=3) for each in models)
    assert torch.equal(one, two) and one.std() > 0


def test_a_data_set_of_bare_images(images, tmp_path):
    """Every image of a batch counts, not only the first; doubles do; their size is remembered."""
    network, path = Constant(), tmp_path / "a.pt"
    model = ddpm.MyDDPM(network)
    loader = DataLoader(list(images.double().reshape(25, 4, 14, 56)), 10)
    ddpm.training_loop(model, loader, 1, torch.optim.SGD(network.parameters()), store_path=path)
    assert network.n_images == 25
    loaded = ddpm.load_model(path, network=network)
    assert model.image_chw == loaded.image_chw == (4, 14, 56)
    with pytest.raises(ddpm.BadInput, match="Constant.*network="):
        ddpm.load_model(path)


def test_a_few_images_may_be_bright():
    bright = torch.full((7, 1, 4, 4), 0.5)
    assert torch.equal(ddpm.images_and_labels(bright, ddpm.MyDDPM(Constant()))[0], bright)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda x, y: ((x + 1) / 2, y), "0 to 1: 2"),
        (lambda x, y: (127.5 * x + 127.5, y), "0 to 255"),
        (lambda x, y: (x.byte(), y), "uint8"),
        (lambda x, y: (x * 2, y), "-2 to 2"),
        (lambda x, y: (x.sqrt(), y), "nan"),
        (lambda x, y: (x[:, 0], y), "50, 28, 28"),
        (lambda x, y: (x.reshape(50, 4, 14, 14), y), "image_channels=4"),
        (lambda x, y: (x, y + 1), "labels must .* 0 to 9"),
        (lambda x, y: (x, y - 1), "labels must .* 0 to 9"),
        (lambda x, y: (x, y / 2), "labels must be 50 whole"),
        (lambda x, y: (x, torch.eye(10)[y].long()), "labels must be 50 whole"),
    ],
)
def test_what_is_no_image_or_no_class_is_refused(change, reason, train, digits):
    with pytest.raises(ddpm.BadInput, match=reason):
        train(dataset=TensorDataset(*change(*digits[:50])))


def test_a_loader_without_a_batch_is_refused(images, tmp_path):
    model = ddpm.MyDDPM(Constant())
    loader = DataLoader(images, 200, drop_last=True)
    optim = torch.optim.SGD(model.parameters())
    with pytest.raises(ddpm.BadInput, match="batch"):
        ddpm.training_loop(model, loader, 1, optim, store_path=tmp_path / "a.pt")


@pytest.mark.parametrize("optim", [torch.optim.Adam, "adam"])
def test_what_is_no_optimizer_is_refused(optim, train):
    with pytest.raises(ddpm.BadInput, match="optimizer"):
        train(optim=optim)


def test_a_loss_that_is_not_finite_leaves_the_old_weights(train):
    network = Usual()
    path = train(1, network, optim=torch.optim.SGD(network.parameters(), 1e-3))[2]
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(2, network, optim=torch.optim.SGD(network.parameters(), 1e30))
    assert path.read_bytes() == before
