"""From noise to images: the sampler, guidance, labels, seeds, what is refused, CUDA, pictures."""

import itertools

import numpy as np
import pytest
import torch
from conftest import Network, frames_of, shows, usual
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

import ddpm

BETAS = torch.linspace(1e-3, 0.6, 20, dtype=torch.float64)
BARS = torch.cat([(1 - BETAS).cumprod(0), torch.ones(1)])  # the last is that of x_0, at step -1
# Two worlds of images in which the best prediction of the noise is known: pixels are Gaussian, or
# grow with the logarithm of the SNR, on a line that shows which of its points counts.
WORLDS = {
    "gaussian": lambda x, a: (1 - a).sqrt() * (x - a.sqrt() * 0.2) / (a * 0.01 + 1 - a),
    "line": lambda x, a: (x - a.sqrt() * a.logit() / 10) / (1 - a).sqrt(),
}


def labelled():
    """-> a network that predicts noise of 0.01 with a label, and 0.004 without."""

    def predict(x, t, label):
        return x * 0 + torch.where(label == 10, 0.004, 0.01).view(-1, 1, 1, 1)

    return Network(predict, n_classes=10)


def draw(model, n_samples=4, sample_steps=3, gif_name=None, **how):
    how |= {"sample_steps": sample_steps, "gif_name": gif_name}
    return ddpm.generate_new_images(model, n_samples, **how)


@pytest.mark.parametrize("variance", [1, 2])
@pytest.mark.parametrize("n_steps", [20, 16, 12, 8])
@pytest.mark.parametrize("predict", WORLDS.values(), ids=WORLDS)
def test_each_step_has_the_mean_and_variance_of_the_papers(predict, n_steps, variance):
    """Of Algorithm 2 with all steps, of SDE-DPM-Solver++(2M) with fewer, which are squares."""
    network = Network(lambda x, t, label: predict(x, BARS[t].float().view(-1, 1, 1, 1)))
    noise = torch.randn(400, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    how = None, 1, n_steps, variance, torch.Generator().manual_seed(1)
    way = list(ddpm.reverse_process(ddpm.MyDDPM(network, 20, 1e-3, 0.6), noise, *how))
    assert torch.equal(way[0], noise)
    steps, last_x0, last_h = [call[1][0].item() for call in network.calls], None, None
    for i, (t, s) in enumerate(itertools.pairwise([*steps, -1])):
        x, a_t, a_s = way[i].double(), BARS[t], BARS[s]
        eta = predict(x, a_t)
        if n_steps == 20:
            mean = (x - BETAS[t] / (1 - a_t).sqrt() * eta) / (1 - BETAS[t]).sqrt()
            var = BETAS[t] if variance == 1 else (1 - a_s) / (1 - a_t) * BETAS[t]
        else:
            x0, h = (x - (1 - a_t).sqrt() * eta) / a_t.sqrt(), (a_s.logit() - a_t.logit()) / 2
            middle = x0 + (x0 - last_x0) / (2 * last_h / h) if i > 0 and s < t - 1 else x0
            mean = ((1 - a_s) / (1 - a_t)).sqrt() * (-h).exp() * x
            mean += a_s.sqrt() * (1 - (-2 * h).exp()) * middle
            var = 1 - a_t / a_s if variance == 1 else (1 - a_s) * (1 - (-2 * h).exp())
            last_x0, last_h = x0, h
        rest, var = way[i + 1] - mean, var if s >= 0 else 0
        assert abs(rest.mean()) < 5 * (var / rest.numel()) ** 0.5 + 1e-5
        assert abs(rest.var() - var) < 5 * var * (2 / rest.numel()) ** 0.5 + 1e-7
    lefts = range(n_steps - 1, -1, -1)
    assert steps == [max(round(19 * (left / lefts[0]) ** 2), left) for left in lefts]


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 2, 4])
@pytest.mark.parametrize("t", [0, 300, 900])
def test_guidance_counts_alike_at_all_steps(guidance, t, images):
    """It goes from the prediction without the label to that with it, and on. x_0 is clipped."""
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    model, x_t = ddpm.MyDDPM(labelled()), 1.5 * images * bar**0.5
    for label, eta_theta in ((torch.zeros(100).long(), 0.004 + guidance * 0.006), (None, 0.004)):
        found = ddpm.predict_x0(model, x_t, t, label, guidance)
        expected = (1.5 * images - ((1 - bar) / bar) ** 0.5 * eta_theta).clamp(-1, 1)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("label", [None, 7, [3, 1] * 6, (torch.arange(12) // 2).byte()])
def test_labels_reach_the_network(label):
    """With guidance 1 it is called once a step, else once more without the label."""
    draw(ddpm.MyDDPM(plain := labelled()), 12, label=label, guidance=1)
    draw(ddpm.MyDDPM(guided := labelled()), 12, label=label, guidance=0.5)
    expected = torch.arange(12) % 10 if label is None else torch.as_tensor(label).expand(12).long()
    assert len(plain.calls) == 3 and len(guided.calls) == 6
    assert all(torch.equal(call[2], expected) for call in plain.calls)
    assert torch.equal(guided.calls[4][2], expected) and (guided.calls[5][2] == 10).all()


def test_same_seed_same_images():
    """Whatever else draws random numbers, or is in the network; and both are left as they were."""
    torch.manual_seed(1)
    model = ddpm.MyDDPM(usual()).train()
    state = torch.get_rng_state()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    one = draw(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(one, draw(model)) and not torch.equal(one, draw(model, SEED=1))
    assert all(map(torch.equal, model.state_dict().values(), before))


def test_what_makes_no_sense_is_refused(tmp_path):
    """Before the network is called, and with nothing written."""
    senseless = {"variance": [3, 0], "guidance": [-1, np.nan], "sample_steps": [0, -1]}
    senseless |= {"n_samples": [0, -1], "label": [10, -1, [0, 1, 2, 10], [0, -1, 2, 3]]}
    for name, value in [(key, value) for key in senseless for value in senseless[key]]:
        how = {"gif_name": tmp_path / "a.gif", name: value}
        with pytest.raises(ddpm.InputError, match=name):
            draw(ddpm.MyDDPM(network := labelled()), **how)
        assert network.calls == list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in ("folder/a.gif", "file/a.gif"):
        with pytest.raises(OSError, match=place):
            draw(ddpm.MyDDPM(network := labelled()), gif_name=tmp_path / place)
        assert network.calls == []


def test_on_cuda_no_value_is_waited_for():
    """Tensors here have but a device and a shape: to ask one for a value, or mix devices, fails."""
    model = ddpm.MyDDPM(ddpm.MyUNet())
    with FakeTensorMode(allow_non_fake_inputs=False):
        x, label = torch.empty(6, 1, 28, 28, device="cuda"), torch.zeros(6, device="cuda").long()
        try:
            x[label]
        except RuntimeError:
            pytest.skip("in this version of torch only a GPU can index such tensors")
        for part, kept in itertools.product(model.modules(), ("_parameters", "_buffers")):
            for name, tensor in getattr(part, kept).items():
                if tensor is not None:
                    how = {"dtype": tensor.dtype, "device": "cuda"}
                    getattr(part, kept)[name] = torch.empty(tensor.shape, **how)
        weights = nn.Parameter(torch.empty(5, 2, 3, 3, device="cuda"))
        weights.grad = torch.empty_like(weights)
        ddpm.Muon([weights]).step()
        found = ddpm.denoising_loss(model, x, label), ddpm.predict_x0(model, x, 500, label, 2)
    assert {tensor.device.type for tensor in found} == {"cuda"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
def test_cuda_does_what_the_cpu_does(train, images):
    """A model trained there draws alike here."""
    _, losses, path = train(3, device="cuda")
    models = [ddpm.load_model(path, device) for device in ("cpu", "cuda")]
    one, two = (ddpm.predict_x0(m, images.to(m.betas.device), 300, None).cpu() for m in models)
    assert losses[2] < losses[0] and (one - two).norm() < 0.05 * one.norm()
    assert draw(models[1]).device.type == "cuda" and draw(models[1]).std() > 0


def test_every_image_is_in_the_grid(images):
    """-1 is black and 1 is white, and what lies beyond is clipped; in colour, too."""
    for n in (1, 2, 5, 7, 9, 10, 11, 13, 14, 17, 100):
        grid = ddpm.tile(1.5 * images[:n])
        assert grid.shape == (28 * -(-n // 10), 28 * min(n, 10))
        for i in range(n):
            row, column = 28 * (i // 10), 28 * (i % 10)
            expected = ((1.5 * images[i, 0]).clamp(-1, 1) * 127.5 + 127.5).round()
            np.testing.assert_array_equal(grid[row : row + 28, column : column + 28], expected)
    red = ddpm.tile(torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(2, 3, 4, 4))
    assert red.shape == (4, 8, 3) and red[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("steps, frames, expected", [(60, 30, 30), (20, 9, 9), (3, 60, 4)])
def test_gif(steps, frames, expected, tmp_path):
    """It goes from the noise to the images, of which it shows a hundred."""
    model = ddpm.MyDDPM(ddpm.MyUNet(50), 50, 1e-3, 0.3)
    how = {"frames_per_gif": frames, "gif_name": tmp_path / "a.gif", "sample_steps": steps}
    images = ddpm.generate_new_images(model, 103, SEED=7, **how)
    shown, durations = zip(*frames_of(tmp_path / "a.gif"), strict=True)
    assert len(shown) == expected and {frame.shape for frame in shown} == {(280, 280)}
    np.testing.assert_array_equal(shown[-1], ddpm.tile(images[:100]))
    noise = torch.randn(103, 1, 28, 28, generator=torch.Generator().manual_seed(7))[:100]
    assert np.abs(shown[0].astype(int) - ddpm.tile(noise)).max() < 16 and len(images) == 103
    assert all((a != b).any() for a, b in itertools.pairwise(shown))
    first, second, *_, last = durations
    assert last >= 2000 and first > second >= 20


@pytest.mark.parametrize("n", [1, 3, 23])
def test_a_figure_shows_the_images(n, images, tmp_path, monkeypatch):
    """Into the file, without a window, and in a window if there is no file; then as they drown."""
    windows, images, path = [], images[:n].clamp(max=0), tmp_path / "a.png"
    monkeypatch.setattr(ddpm.plt, "show", lambda: windows.append(1))
    loader, model = DataLoader(TensorDataset(images), n), ddpm.MyDDPM(Network())
    ddpm.show_first_batch(loader, path)
    assert shows(path, ddpm.tile(images, gap=1))
    torch.manual_seed(0)
    ddpm.show_forward(model, loader, path=path)
    torch.manual_seed(0)
    x0 = next(iter(loader))[0][:10]
    rows = [x0, *(model(x0, t) for t in (49, 99, 199, 399, 999))]
    assert shows(path, ddpm.tile(torch.cat(rows), gap=1, columns=len(x0)))
    assert windows == []
    ddpm.show_images(images.numpy())
    assert windows == [1] and ddpm.plt.get_fignums() == []
