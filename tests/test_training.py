"""Training: the loss, the average of the weights, the weights file, reproducing and resuming."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

import ddpm


def test_training_lowers_the_loss(trained):
    _, losses, _ = trained
    # Answering nothing at all makes a loss of 1, the variance of the noise.
    assert len(losses) == 2 and losses[0] < 1.1
    assert losses[1] < 0.8 * losses[0]


@torch.no_grad()
def test_trained_model_finds_the_noise_in_images_it_never_saw(trained):
    torch.manual_seed(0)
    untrained = ddpm.MyUNet(**trained[0].network.settings)
    x0 = ddpm.load_images(train=False)[:256].unsqueeze(1).float() / 127.5 - 1
    t, eta = torch.arange(256) * 1000 // 256, torch.randn(256, 1, 28, 28)
    noisy = trained[0](x0, t, eta)
    loss = F.mse_loss(trained[0].backward(noisy, t), eta)
    before = F.mse_loss(untrained(noisy, t), eta)
    assert loss < 0.7 * before, (loss, before)


def test_weights_file_alone_rebuilds_the_model(trained, images, tmp_path):
    model, losses, store_path = trained
    elsewhere = tmp_path / "renamed.pt"
    shutil.copy(store_path, elsewhere)
    loaded = ddpm.load_model(elsewhere)
    assert not loaded.training
    assert loaded.n_steps == 1000 and loaded.image_chw == (1, 28, 28)
    for name in ("betas", "alphas", "alpha_bars"):
        assert torch.equal(getattr(loaded, name), getattr(model, name))
    assert loaded.betas[-1].item() == pytest.approx(0.03)
    t = torch.linspace(0, 999, 16).long()
    with torch.no_grad():
        for guidance in (1, 3):
            guesses = [m.backward(images[:16], t, guidance) for m in (loaded, model)]
            assert torch.equal(*guesses)
    assert loaded.info["losses"] == losses
    assert loaded.info["flags"] == {"SEED": 0, "batch_size": 32}


def test_a_long_schedule_of_small_steps_comes_back(digits, tmp_path):
    """10,000 of the default steps would leave nothing of an image; these leave as much as 1000."""
    schedule, store_path = (1e-5, 2e-3), tmp_path / "weights.pt"
    model = ddpm.MyDDPM(ddpm.MyUNet(10_000, 16, betas=schedule), 10_000, *schedule)
    optim = torch.optim.SGD(model.parameters(), 0.01)
    ddpm.training_loop(model, ddpm.Batches(digits[:32]), 1, optim, store_path=store_path)
    assert torch.equal(ddpm.load_model(store_path).betas, model.betas)


def test_weights_file_holds_no_code(trained):
    content = torch.load(trained[2], weights_only=True)
    assert content["losses"] == trained[1]


def test_nothing_is_left_lying_about(trained):
    names = {path.name for path in trained[2].parent.iterdir()}
    assert len(names) == 2 and "weights.pt" in names  # and what resuming needs


class Sees(nn.Module):
    """A small network with buffers that an average would spoil: a count, and a mask of -inf."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x, t):
        return self.conv(x)


def test_weights_kept_are_an_average_and_buffers_are_not(digits, tmp_path):
    torch.manual_seed(0)
    model = ddpm.MyDDPM(Sees(), 100, 1e-3, 0.1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optim = torch.optim.SGD(model.parameters(), 0.1)
    history = []
    optim.register_step_post_hook(
        lambda *_: history.append(model.network.conv.weight.detach().clone())
    )
    store_path = tmp_path / "a.pt"
    ddpm.training_loop(model, ddpm.Batches(digits, 30), 2, optim, store_path=store_path)
    weights = torch.load(store_path, weights_only=True)["weights"]
    for name, buffer in before.items():
        assert torch.equal(weights[name], buffer) and torch.equal(model.state_dict()[name], buffer)
    assert len(history) == 200
    average, steps = weights["network.conv.weight"], torch.stack(history)
    assert torch.equal(average, model.network.conv.weight)
    # Between the smallest and the largest of all steps, but none of them; and clearly nearer to
    # the later half than to the start.
    assert (average >= steps.amin(0) - 1e-6).all() and (average <= steps.amax(0) + 1e-6).all()
    distance = (steps - average).flatten(1).norm(dim=1)
    assert distance.min() > 0
    assert distance[100:].mean() < distance[0]
    # Steadier than the last steps, whose weights jump about by the noise of their batches.
    assert not torch.equal(average, steps[-1])


@pytest.fixture(scope="module")
def unbroken(train, digits, tmp_path_factory):
    """-> weights file and losses of two epochs on 320 images."""
    store_path = tmp_path_factory.mktemp("unbroken") / "weights.pt"
    return store_path, train(digits[:320], store_path)[1]


def test_same_seed_same_bytes_other_seed_others(train, digits, unbroken, tmp_path):
    torch.rand(5)  # whatever happened before may not matter
    _, losses = train(digits[:320], tmp_path / "same.pt")
    assert losses == unbroken[1]
    assert (tmp_path / "same.pt").read_bytes() == unbroken[0].read_bytes()
    _, losses = train(digits[:320], tmp_path / "other.pt", n_epochs=1, SEED=1)
    assert losses[0] != unbroken[1][0]


class Breaks:
    """A loader that is interrupted, as by Ctrl-C, in the middle of its second epoch."""

    def __init__(self, loader):
        self.loader, self.dataset, self.epochs = loader, loader.dataset, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.epochs += 1
        for i, batch in enumerate(self.loader):
            if self.epochs == 2 and i == 4:
                raise KeyboardInterrupt
            yield batch


def test_resumed_training_equals_an_unbroken_one(train, digits, unbroken, tmp_path):
    store_path = tmp_path / "weights.pt"
    with pytest.raises(KeyboardInterrupt):
        train(digits[:320], store_path, wrap=Breaks)
    first = ddpm.load_model(store_path)  # the whole first epoch can be used
    early = ddpm.load_model(unbroken[0]).early  # and is the part of the training that guides
    for name, weights in first.network.state_dict().items():
        assert torch.equal(weights, early.state_dict()[name])
    assert first.info["losses"] == unbroken[1][:1]
    torch.rand(5)
    _, losses = train(digits[:320], store_path, resume=True)
    assert losses == unbroken[1]
    assert store_path.read_bytes() == unbroken[0].read_bytes()


def test_one_model_trained_again_forgets_the_old_early_weights(digits, tmp_path):
    """In a notebook the same object is trained again, or on: as a new one would be."""

    def go(model, name, n_epochs, resume=False):
        optim = torch.optim.SGD(model.parameters(), 0.01)
        loader, flags = ddpm.Batches(digits[:64], 32), {"resume": resume}
        ddpm.training_loop(model, loader, n_epochs, optim, store_path=tmp_path / name, flags=flags)

    torch.manual_seed(0)
    model = ddpm.MyDDPM(Sees(), 100, 1e-3, 0.1)
    go(model, "a.pt", 2)
    first = model.early.conv.weight.clone()
    go(model, "b.pt", 2)
    assert not torch.equal(model.early.conv.weight, first)
    go(model, "b.pt", 3, resume=True)
    model.load_state_dict(ddpm.MyDDPM(Sees(), 100).state_dict(), True)
    assert model.early is None


def test_every_epoch_has_its_own_order_and_noise(digits, tmp_path):
    class Notes(Sees):
        def forward(self, x, t):
            if self.training:
                seen.append((x.detach().clone(), t.clone()))
            return super().forward(x, t)

    seen = []
    model = ddpm.MyDDPM(Notes(), 100, 1e-3, 0.1)
    optim = torch.optim.SGD(model.parameters(), 0.1)
    loader = ddpm.Batches(digits[:64], 64)
    ddpm.training_loop(model, loader, 2, optim, store_path=tmp_path / "a.pt")
    (x, t), (other_x, other_t) = seen
    assert not torch.equal(x, other_x) and not torch.equal(t, other_t)
    # Steps from all over the range, not only from its start or its end.
    assert t.min() < 10 and t.max() >= 90 and abs(t.float().mean() - 49.5) < 15


def test_loader_gives_every_image_once_an_epoch(digits):
    loader = ddpm.Batches(digits[:70], 32)
    batches = [batch[0] for batch in loader]
    assert [len(batch) for batch in batches] == [32, 32, 6] and len(loader) == 3
    seen = torch.cat(batches)
    assert seen.shape == (70, 1, 28, 28) and seen.dtype == torch.float32
    assert seen.min() == -1 and seen.max() == 1
    back = ((seen.squeeze(1) + 1) * 127.5).round().to(torch.uint8)
    assert sorted(map(bytes, back.numpy())) == sorted(map(bytes, digits[:70].numpy()))
    assert not torch.equal(back, digits[:70])  # shuffled
    assert not torch.equal(seen, torch.cat([batch[0] for batch in loader]))


def test_loader_of_images_and_labels_works_too(tmp_path, digits):
    raw = Path(ddpm.data_dir, "MNIST", "raw")
    shutil.copytree(raw, tmp_path / "MNIST" / "raw", ignore=shutil.ignore_patterns("*-ubyte"))
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Lambda(lambda x: (x - 0.5) * 2)]
    )
    dataset = MNIST(tmp_path, download=True, train=True, transform=transform)
    image, _ = dataset[0]
    torch.testing.assert_close(image[0], digits[0].float() / 127.5 - 1)
    loader = DataLoader(Subset(dataset, range(96)), 32, shuffle=True)
    torch.manual_seed(0)
    model = ddpm.MyDDPM(ddpm.MyUNet(100, 16), 100)
    optim = torch.optim.Adam(model.parameters(), 0.001)
    losses = ddpm.training_loop(model, loader, 1, optim, "cpu", False, tmp_path / "model.pt")
    assert len(losses) == 1 and 0 < losses[0] < 2
    assert ddpm.load_model(tmp_path / "model.pt").n_steps == 100
    ddpm.show_first_batch(loader, tmp_path / "batch.png")
    ddpm.show_forward(model, loader, "cpu", tmp_path / "forward.png")
    assert (tmp_path / "batch.png").exists() and (tmp_path / "forward.png").exists()


@pytest.mark.parametrize("fashion", [False, True])
@pytest.mark.parametrize("train_split, n", [(True, 60_000), (False, 10_000)])
def test_images_are_those_of_the_archive(fashion, train_split, n):
    images = ddpm.load_images(fashion, train_split)
    assert images.shape == (n, 28, 28) and images.dtype == torch.uint8
    assert images.amin() == 0 and images.amax() == 255
    # Means of the four sets as their authors and many tutorials give them, in units of 255.
    known = {(False, True): 0.1307, (True, True): 0.2860}
    if train_split:
        assert images.float().mean().item() / 255 == pytest.approx(known[fashion, True], abs=1e-4)
