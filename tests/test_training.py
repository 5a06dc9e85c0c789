"""The loss, the training loop and what it leaves behind."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ddpm


class Nothing(nn.Module):
    """Predicts no noise at all, and remembers the steps and labels it was asked for."""

    n_classes = 10

    def __init__(self):
        super().__init__()
        self.steps, self.labels = [], []

    def forward(self, x, t, label=None):
        self.steps.append(t)
        self.labels.append(label)
        return torch.zeros_like(x)


class Plain(nn.Module):
    """A network of the report's kind: (x, t) and no label."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def test_data_are_images_and_labels(digits):
    images, labels = digits.tensors
    assert images.shape[1:] == (1, 28, 28) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.tolist()[:5] == [5, 0, 4, 1, 9]
    test_images, test_labels = ddpm.load_data(fashion=True, train=False).tensors
    assert len(test_images) == len(test_labels) == 10_000
    assert test_labels.bincount().tolist() == [1000] * 10


def test_batches_hold_each_image_once_in_new_order(digits):
    loader = ddpm.batches(digits, 300)
    rounds = [torch.cat([batch[0] for batch in loader]) for _ in range(2)]
    assert [len(batch[0]) for batch in loader] == [300] * 6 + [200]
    assert not torch.equal(*rounds)
    expected = digits.tensors[0].double().sum((1, 2, 3)).sort().values
    for images in rounds:
        assert torch.equal(images.double().sum((1, 2, 3)).sort().values, expected)
    x0, label = next(iter(ddpm.batches(TensorDataset(digits.tensors[1], digits.tensors[1]), 9)))
    assert torch.equal(x0, label)


def test_dropped_labels_are_a_tenth_and_steps_cover_the_range(digits):
    images, labels = digits.tensors
    network = Nothing()
    model = ddpm.MyDDPM(network)
    torch.manual_seed(0)
    ddpm.denoising_loss(model, images, labels)
    found, t = network.labels[0], network.steps[0]
    dropped = found == 10
    assert 0.07 < dropped.double().mean() < 0.13
    assert torch.equal(found[~dropped], labels[~dropped])
    assert 0 <= t.min() < 5 and 990 < t.max() <= 999
    assert (t < 500).sum() > (t >= 500).sum() > len(t) / 10


def test_the_reported_error_is_the_mean_over_all_steps(digits):
    """The noise is standard normal: who predicts 0 is wrong by 1, however steps are drawn."""
    torch.manual_seed(0)
    loss, error = ddpm.denoising_loss(ddpm.MyDDPM(Nothing()), digits.tensors[0])
    assert abs(error - 1) < 0.02
    assert loss > error  # late steps weigh more


def test_each_weight_has_one_optimizer():
    network = ddpm.MyUNet()
    optims = ddpm.make_optimizers(network, 0.02)
    held = [p for optim in optims for group in optim.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, network.parameters()))


def test_it_learns_and_stores_the_average(train):
    model, losses, path = train(3)
    assert len(losses) == 3 and losses[2] < losses[0] - 0.02
    loaded = ddpm.load_model(path)
    assert loaded.info["losses"] == losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_training_is_reproducible(train):
    one, two, other = train(), train(), train(flags={"SEED": 1})
    assert one[1] == two[1] != other[1]
    assert all(map(torch.equal, one[0].parameters(), two[0].parameters()))


@pytest.mark.parametrize("n_epochs", [1, 10])
def test_learning_rate_rises_and_falls(n_epochs, train):
    network, rates = Plain(), []
    optim = torch.optim.SGD(network.parameters(), 1e-6)
    optim.register_step_pre_hook(lambda *_: rates.append(optim.param_groups[0]["lr"]))
    train(n_epochs, network, optim=optim)
    top = rates.index(max(rates))
    assert len(rates) == 20 * n_epochs and top < len(rates) / 10
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert 0.8e-6 < rates[top] <= 1e-6 and rates[-1] < 0.1e-6


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("network", [Plain, ddpm.MyUNet])
def test_the_reports_way_to_train(labelled, network, digits, tmp_path):
    """Its loader yields lists [x0, label], or only [x0]; it has one optimizer."""
    data = digits[:100] if labelled else digits[:100][:1]
    model = ddpm.MyDDPM(network())
    loader = DataLoader(TensorDataset(*data), 50, shuffle=True)
    before = [p.clone() for p in model.parameters()]
    optim = torch.optim.Adam(model.parameters(), 0.01)
    ddpm.training_loop(model, loader, 2, optim, None, False, tmp_path / "a.pt")
    assert not all(map(torch.equal, before, model.parameters()))


def test_a_loss_that_is_not_finite_stops_it(train):
    path = train()[2]
    before = path.read_bytes()
    network = ddpm.MyUNet()
    optims = [torch.optim.SGD(network.parameters(), 1e30)]
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(2, network, optim=optims)
    assert path.read_bytes() == before


def test_display_draws_after_each_epoch(train, monkeypatch):
    titles = []
    monkeypatch.setattr(ddpm, "show_images", lambda images, title, path: titles.append(title))
    train(2, display=True)
    assert len(titles) == 2 and titles[0] != titles[1]
