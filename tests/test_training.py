"""The loss, the optimizer, the training loop, what it leaves behind, and what it goes on from."""

import itertools
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, Network, usual
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ddpm

T, LOW, HIGH = 100, 1e-3, 0.15
BARS = torch.from_numpy(np.cumprod(1 - np.linspace(LOW, HIGH, T)))


def rate(p):  # the share of lr when a share p of the training is over
    return np.minimum(p / 0.05, (1 - p) / 0.95)


def loss_of(network, x0, label=None):
    return ddpm.denoising_loss(ddpm.MyDDPM(network, T, LOW, HIGH), x0, label)


def test_steps_are_drawn_by_their_density_and_a_tenth_of_the_labels_is_dropped():
    """Each t is drawn on its own: counts are as far off as chance has them, and no farther."""
    network, labels = Network(n_classes=10), torch.arange(200_000) % 10
    loss_of(network, torch.zeros(5000, 1, 1, 1))
    loss_of(network, torch.zeros(200_000, 1, 1, 1), labels)
    (_, _, none, _), (x, t, kept, _) = network.calls
    expected = 200_000 * BARS.sqrt() / BARS.sqrt().sum()
    off = (t.bincount(minlength=T) - expected) / expected.sqrt()
    assert off.abs().max() < 5 and 0.7 < off.std() < 1.3
    assert abs(np.corrcoef(t, np.arange(200_000))[0, 1]) < 0.01
    eta = x.flatten() / (1 - BARS[t]).sqrt()
    assert abs(eta.mean()) < 0.01 and abs(eta.std() - 1) < 0.01 and (none == 10).all()
    assert abs((kept == 10).double().mean() - 0.1) < 0.003
    assert torch.equal(kept[kept != 10], labels[kept != 10])


@pytest.mark.parametrize("predicts_v", [True, False])
def test_loss_is_the_mean_error_of_the_noise_over_all_steps(predicts_v):
    """However often each is drawn. Here all images are -0.5, and t / T makes predictions wrong."""

    def predict(x, t, label):
        bar, error = BARS[t].view(-1, 1, 1, 1), 1 + t.view(-1, 1, 1, 1) / T
        eta = (x + 0.5 * bar.sqrt()) / (1 - bar).sqrt()
        return error + (bar.sqrt() * eta + 0.5 * (1 - bar).sqrt() if predicts_v else eta)

    loss = loss_of(Network(predict, predicts_v=predicts_v), torch.full((100_000, 1, 2, 3), -0.5))
    squares = (1 + torch.arange(T) / T) ** 2 * (BARS if predicts_v else 1)
    variance = (squares.square() * BARS.sqrt().mean() / BARS.sqrt()).mean() - squares.mean() ** 2
    assert abs(loss - squares.mean()) < 4 * (variance / 100_000) ** 0.5


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 1)])
def test_orthogonalize_is_the_quintic_iteration(shape):
    matrix = torch.randn(shape) * torch.logspace(0, -2, shape[-1])
    x = matrix.double() / matrix.double().norm()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * (x @ x.mT) @ x + 2.0315 * (x @ x.mT) @ (x @ x.mT) @ x
    torch.testing.assert_close(ddpm.orthogonalize(matrix).double(), x, atol=1e-4, rtol=1e-4)
    assert not ddpm.orthogonalize(torch.zeros(shape)).any()


def test_muon_makes_the_momentum_orthogonal():
    """Nesterov's; a vector is one column. Groups have their own rates; without a gradient nothing
    moves."""
    shapes, rates, idle = [(4,), (8, 24), (6, 4, 3, 3)], [0.1, 0.02, 0.02], torch.ones(3, 2)
    ours = [*map(nn.Parameter, map(torch.zeros, shapes)), nn.Parameter(idle.clone())]
    ours[2].data = ours[2].data.to(memory_format=torch.channels_last)
    optim = ddpm.Muon([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.02}], 0.1)
    means, expected = [torch.zeros(s) for s in shapes], [torch.zeros(s) for s in shapes]
    for _ in range(4):
        for i, shape in enumerate(shapes):
            ours[i].grad = torch.empty_like(ours[i]).copy_(grad := torch.randn(shape))
            means[i] = 0.95 * means[i] + 0.05 * grad
            ahead = (0.95 * means[i] + 0.05 * grad).reshape(shape[0], -1)
            expected[i] = expected[i] - rates[i] * ddpm.orthogonalize(ahead).view(shape)
        optim.step()
    for our, value in zip(ours, [*expected, idle], strict=True):
        torch.testing.assert_close(our.detach(), value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_epochs", [1, 3])
def test_each_step_of_the_training(n_epochs, train, monkeypatch, digits):
    """Rates rise and fall; they and the gradients of this step alone move the weights."""
    network, rates, moves, each_loss = Network(), [], [], []
    groups = [{"params": [network.noise]}, {"params": [network.other], "lr": 1e-3}]
    optim, denoising_loss = torch.optim.SGD(groups, 0.1), ddpm.denoising_loss

    def keep(*_):
        rates.append([group["lr"] for group in optim.param_groups])
        moves.append([network.noise.grad.item(), network.noise.item()])

    def loss_that_is_kept(*arguments):
        each_loss.append(denoising_loss(*arguments))
        return each_loss[-1]

    monkeypatch.setattr(ddpm, "denoising_loss", loss_that_is_kept)
    optim.register_step_post_hook(keep)
    _, losses, path = train(n_epochs, network, digits[:], optim)
    n = 20 * n_epochs
    factors = rate(np.arange(1, n + 1) / (n + 1))
    np.testing.assert_allclose(rates, np.outer(factors, [0.1, 1e-3]), rtol=1e-6)
    gradients, weights = np.transpose(moves)
    np.testing.assert_allclose(weights, 3 - np.cumsum(0.1 * factors * gradients), atol=1e-4)
    assert abs(np.mean(gradients / 2 - np.append(3, weights[:-1]))) < 0.2
    assert ddpm.load_model(path, network=Network()).network.noise == network.noise
    assert losses == pytest.approx(torch.stack(each_loss).view(n_epochs, 20).mean(1).tolist())


@pytest.mark.parametrize("make", [usual, ddpm.MyUNet, lambda: ddpm.MyUNet(n_classes=0)])
def test_any_network_learns_and_draws(make, train, digits):
    """From [x0, label] or only [x0]; the same seed gives the same."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        data = digits[:100] if (network := make()).n_classes else digits[:100][:1]
        optim = torch.optim.Adam(network.parameters(), 0.01)
        runs.append(train(3, network, data, optim, batch_size=10))
    (one, losses, path), (two, same_losses, _) = runs
    models = [one, two, ddpm.load_model(path, network=make())]
    drawn = [ddpm.generate_new_images(each, 2, None, 9, None, sample_steps=3) for each in models]
    assert losses[2] < 0.95 * losses[0] and losses == same_losses and drawn[0].std() > 0
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_training_again_and_again_without_a_seed(images, tmp_path, monkeypatch):
    """As a cell is, on images of another shape; they all count, and none of those in pictures. The
    rate is 0: each epoch has other noise. Flags count in main only: here a forgotten argument of
    the same name would silently be one."""
    network, path, losses = Network(), tmp_path / "a.pt", []
    for name in re.findall(r"(?m)^(\w+) = .+  # ", (ROOT / "ddpm.py").read_text()):
        monkeypatch.setattr(ddpm, name, object())
    loader = DataLoader(TensorDataset(images.reshape(25, 4, 14, 56)), 10)
    optim = torch.optim.SGD(network.parameters(), 0.0)
    torch.seed()
    for _ in range(9):
        model = ddpm.MyDDPM(network, image_chw=(4, 14, 56))
        losses += ddpm.training_loop(model, loader, 2, optim, None, True, path)
    assert len(set(losses)) == 18
    assert sum(len(x) for x, _, _, training in network.calls if training) == 9 * 2 * 25
    assert ddpm.load_model(path, network=network).image_chw == (4, 14, 56)
    assert path.with_name("a.pt.png").exists()
    ddpm.generate_new_images(model, 2, sample_steps=3, gif_name=tmp_path / "a.gif")


def test_what_fails_leaves_the_old_weights(train, digits):
    """Images or labels that are none; no epoch; an optimizer made for the model of before, as in a
    cell run twice; too high a rate."""
    path, (x, y) = train()[2], digits[:50]
    before = path.read_bytes()
    ranges = [(x + 1) / 2, 127.5 * x + 127.5, 2 * x + 1, 2 * x - 1, x.sqrt()]
    for bad, size in itertools.product([*ranges, x.reshape(50, 4, 14, 14)], (1, 4, 50)):
        with pytest.raises(ddpm.InputError, match="images must"):
            train(data=(bad, y), batch_size=size)
    for data in (x,), (x, 0 * y + 10), (x, 0 * y - 1):
        with pytest.raises(ddpm.InputError, match="labels must"):
            train(data=data)
    with pytest.raises(ddpm.InputError, match="n_epochs"):
        train(0)
    with pytest.raises(ddpm.InputError, match="optimizer"):
        train(optim=ddpm.Muon(ddpm.MyUNet().parameters()))
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ddpm.InputError, match="epoch 1"):
        train(2, network := usual(), optim=torch.optim.SGD(network.parameters(), 1e30))
    assert path.read_bytes() == before


def test_a_training_goes_on_only_if_it_can_be_what_was_meant(train, digits, capsys):
    """Not if too many epochs are done, or with another schedule or size of images; another
    optimizer begins without momentum. The finished weights stay until the end."""
    path, (x, y), steps, known = train()[2], digits[:100], iter(range(6)), []
    optim = ddpm.Muon((network := ddpm.MyUNet()).parameters())
    optim.register_step_post_hook(lambda *_: next(steps))
    with pytest.raises(StopIteration):
        train(200, network, optim=optim)  # stopped in its fourth epoch
    before = [file.read_bytes() for file in sorted(path.parent.iterdir())]
    for n_epochs in (1, 3):
        with pytest.raises(ddpm.InputError, match="3 epochs"):
            train(n_epochs, resume=True)
    for given in ({"n_steps": 999}, {"max_beta": 0.03}, {"min_beta": 2e-4}):
        with pytest.raises(ddpm.InputError, match="another schedule"):
            train(9, model=ddpm.MyDDPM(ddpm.MyUNet(), **given), resume=True)
    with pytest.raises(ddpm.InputError, match="size of images"):
        model = ddpm.MyDDPM(ddpm.MyUNet(), image_chw=(1, 28, 20))
        train(9, data=(x[..., 4:-4], y), model=model, resume=True)
    assert [file.read_bytes() for file in sorted(path.parent.iterdir())] == before
    optim = torch.optim.Adam((network := ddpm.MyUNet()).parameters(), 1e-4)
    optim.register_step_pre_hook(lambda *_: known.append(len(optim.state)))
    losses = train(4, network, optim=optim, resume=True)[1]
    assert "after epoch 3" in capsys.readouterr().out and len(known) == 2 and known[0] == 0
    with pytest.raises(ddpm.InputError, match="4 epochs"):
        train(3, resume=True)
    for n_epochs in (4, 6):  # there is nothing left to do, and then there is
        more = train(n_epochs, resume=True)[1]
        assert len(more) == n_epochs and more[:4] == losses
