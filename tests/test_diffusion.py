"""The data, the schedule, the forward process, the prediction of the noise, and the network."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, Network, change_a_bit

import ddpm

STEPS = torch.arange(100) * 10
LABELS = torch.arange(100) % 10
BARS = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[STEPS].view(-1, 1, 1, 1)


def test_data_are_images_and_labels_from_whole_archives(tmp_path, monkeypatch):
    """Here without any network: what is missing or damaged can't be had."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    (raw := tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for path in (ROOT / "datasets" / "MNIST" / "raw").glob("*.gz"):
        shutil.copyfile(path, raw / path.name)
    images, labels = ddpm.load_data(data_dir=tmp_path).tensors
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.tolist()[:5] == [5, 0, 4, 1, 9]
    clothes, kinds = ddpm.load_data(fashion=True, train=False).tensors
    assert len(clothes) == len(kinds) == 10_000 and kinds.bincount().tolist() == [1000] * 10
    unpacked = raw / "train-images-idx3-ubyte"
    archive = unpacked.with_suffix(".gz")
    cut_off = partial(unpacked.write_bytes, b"cut off")
    for harm in (cut_off, partial(change_a_bit, archive), archive.unlink):
        harm()
        with pytest.raises(ddpm.InputError, match="MNIST/raw"):
            ddpm.load_data(data_dir=tmp_path)
        unpacked.unlink(missing_ok=True)


def test_schedule(tmp_path):
    for given in (), (2, 0.5, 0.999), (9000, 1e-5, 2e-3):
        ddpm.store(tmp_path / "a.pt", ddpm.MyDDPM(Network(), *given), [])
        state = ddpm.load_model(tmp_path / "a.pt", network=Network()).state_dict()
        n_steps, low, high = given or (1000, 1e-4, 0.02)
        betas = np.linspace(low, high, n_steps)
        np.testing.assert_allclose(state["betas"], betas, rtol=1e-6)
        np.testing.assert_allclose(state["alphas"], 1 - betas, rtol=1e-6)
        np.testing.assert_allclose(state["alpha_bars"], np.cumprod(1 - betas), rtol=1e-6)
    assert ddpm.MyDDPM(Network(), device="meta").betas.device.type == "meta"
    impossible = [(1, 0.1, 0.9), (0, 0.1, 0.9), (9, 0, 0.9), (9, 0.9, 0.8), (9, 0.1, 1), (-5,)]
    impossible += [(9, -0.1, 0.5), (9, 0.1, np.nan), (99, 0.5, 0.9), (100,), (200,), (9, 0.1, 0.2)]
    for given in impossible:
        with pytest.raises(ddpm.InputError, match="schedule"):
            ddpm.MyDDPM(Network(), *given)


def test_forward_is_the_closed_form(images):
    """The noise is standard normal: at the last step next to nothing else is left."""
    model, eta = ddpm.MyDDPM(Network()), torch.randn(images.shape)
    expected = BARS.sqrt() * images + (1 - BARS).sqrt() * eta
    torch.testing.assert_close(model(images, STEPS, eta).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, 500, eta)[50], model(images, STEPS, eta)[50])
    noisy = model(images, 999)
    assert abs(noisy.mean()) < 0.02 and abs(noisy.std() - 1) < 0.02


def test_a_network_says_whether_it_predicts_the_noise_or_v(images):
    """v = sqrt(alpha_bar) eta - sqrt(1 - alpha_bar) x0: a network that knows v leads to eta."""
    model = ddpm.MyDDPM(Network(lambda x, t, label: x * t.view(-1, 1, 1, 1)))
    expected = images * STEPS.view(-1, 1, 1, 1)
    assert torch.equal(model.backward(images, STEPS[:, None], LABELS[:, None]), expected)
    assert torch.equal(model.backward(images, 7), images * 7)
    assert {given.shape for call in model.network.calls for given in call[1:3]} == {(100,)}
    eta = torch.randn(images.shape)
    v = (BARS.sqrt() * eta - (1 - BARS).sqrt() * images).float()
    model = ddpm.MyDDPM(Network(lambda x, t, label: v, predicts_v=True))
    found = model.backward(model(images, STEPS, eta), STEPS)
    torch.testing.assert_close(found, eta, atol=1e-4, rtol=1e-4)
    del (silent := Network()).predicts_v
    with pytest.raises(AttributeError, match="predicts_v"):
        ddpm.MyDDPM(silent).backward(images, 7)


OTHER_SHAPES = [(1, lambda x: x[:, 0]), (1, lambda x: x.mean((1, 2, 3), keepdim=True))]
OTHER_SHAPES += [(3, lambda x: x[:, :1]), (1, lambda x: x.repeat(1, 2, 1, 1)), (3, lambda x: x[:1])]


@pytest.mark.parametrize("predicts_v", [True, False])
@pytest.mark.parametrize("channels, other", OTHER_SHAPES)
def test_a_prediction_of_another_shape_is_refused(channels, other, predicts_v, digits, train):
    """It would be broadcast in silence. A training is refused before it begins."""
    x0, label = digits[:90]
    x0 = x0.repeat(1, channels, 1, 1)
    network = Network(lambda x, t, label: other(x), predicts_v=predicts_v)
    model = ddpm.MyDDPM(network, image_chw=x0.shape[1:])
    for call in (lambda: model.backward(x0, 7), lambda: train(data=(x0, label), model=model)):
        with pytest.raises(ddpm.InputError, match="network predicts"):
            call()


@pytest.mark.parametrize(
    "n_classes, time_emb_dim, chw", [(5, 128, (1, 28, 28)), (0, 32, (3, 8, 12))]
)
def test_what_is_stored_can_be_loaded(n_classes, time_emb_dim, chw, tmp_path):
    """Numbers may be those of numpy; classes and sizes are those of the weights."""
    n_steps, *chw = np.array([1200, *chw])
    network = ddpm.MyUNet(n_steps, time_emb_dim, n_classes, chw[0])
    ddpm.store(tmp_path / "a.pt", ddpm.MyDDPM(network, n_steps, image_chw=tuple(chw)), [])
    model = ddpm.load_model(tmp_path / "a.pt")
    assert (model.image_chw, model.network.n_classes) == (tuple(chw), n_classes)
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor)
    assert ddpm.generate_new_images(model, 2, sample_steps=2, gif_name=None).shape == (2, *chw)


@pytest.mark.parametrize("n, d", [(1000, 128), (50, 7), (1, 1)])
def test_sinusoidal_embedding(n, d):
    t, i = np.arange(n)[:, None], np.arange(d)[None, :]
    angle = t / 10_000 ** ((i - i % 2) / d)
    expected = np.where(i % 2 == 0, np.sin(angle), np.cos(angle))
    np.testing.assert_allclose(ddpm.sinusoidal_embedding(n, d), expected, atol=1e-6)


def test_a_fresh_unet_takes_x_for_the_noise(images):
    """Its v is 0, which is right where x is nearly all noise; of images in colour, too."""
    model = ddpm.MyDDPM(ddpm.MyUNet())
    expected = (1 - BARS).sqrt().float() * images
    torch.testing.assert_close(model.backward(images, STEPS, LABELS), expected)
    network = ddpm.MyUNet(100, 32, n_classes=3, image_channels=3)
    colours = images[:6].reshape(2, 3, 28, 28)[..., :16]
    t, label = torch.tensor([0, 99]), torch.tensor([2, 3])
    assert torch.equal(network(colours, t, label), torch.zeros(2, 3, 28, 16))


@pytest.mark.parametrize("name, limits", [("mnist", (0.14, 0.07)), ("fashion", (0.32, 0.13))])
@torch.no_grad()
def test_the_stored_weights_predict_noise_well(name, limits):
    """In test images, with their labels and steps better than with others, in a batch as alone."""
    model = ddpm.load_model(ROOT / "outputs" / f"{name}.pt")
    x0, label = ddpm.load_data(name == "fashion", train=False)[:100]
    torch.manual_seed(0)
    for t, limit in zip((20, 100), limits, strict=True):
        x_t = model(x0, t, eta := torch.randn_like(x0))
        told = [(t, label), (t, (label + 1) % 10), (t + 100, label)]
        right, *wrong = ((model.backward(x_t, *each) - eta).square().mean() for each in told)
        assert right < min(limit, *wrong)
    together, alone = (model.backward(x0[:n], STEPS[:n], label[:n])[0] for n in (100, 1))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
