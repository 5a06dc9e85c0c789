"""Computing elsewhere than on the CPU, shown without a GPU.

A device called meta, whose tensors have no values, stands in for it, as strict as any of them:
tensors of two devices don't mix, there is no float64 (as on Apple's MPS), and every number that
the host asks for is counted, because a GPU would be waited for.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpm

CPU, META = torch.device("cpu"), torch.device("meta")
ATEN = torch.ops.aten


class Strict(TorchDispatchMode):
    """Watches every operation while it is active; `waits` counts the copies to and from the host."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in given}
        if META not in devices | {kwargs.get("device")}:
            return function(*args, **kwargs)
        if function is ATEN._local_scalar_dense.default:
            self.waits += 1
            return True if args[0].dtype == torch.bool else 1
        if function in (ATEN._to_copy.default, ATEN.copy_.default):
            target = kwargs.get("device") or args[0].device
            self.waits += {target, *devices} == {CPU, META}
            if target == CPU and META in devices:  # there is no content: make it up
                result = torch.full(args[0].shape, 0.01).to(kwargs.get("dtype") or args[0].dtype)
                return result if function is ATEN._to_copy.default else args[0].copy_(result)
        else:
            assert CPU not in devices, f"{function} of tensors on the host and on the device"
        assert kwargs.get("generator") is None, f"{function} with a generator of the host"
        results = function(*args, **kwargs)
        for x in tree_leaves(results):
            on_device = isinstance(x, torch.Tensor) and x.device == META
            assert not (on_device and x.dtype == torch.float64), f"{function} makes float64"
        return results


class NoGenerator:
    """Instead of torch.Generator, of which the device has none."""

    def __init__(self, device="cpu"):
        assert torch.device(device) == META

    def manual_seed(self, seed):
        return None


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setattr(ddpm, "fast_precision", lambda device: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    with Strict() as mode:
        yield mode


BAD = {
    "mixed": lambda x: x + torch.zeros(3),
    "index of the host": lambda x: x[torch.zeros(2).long()],
    "float64": lambda x: x.double(),
    "float64 made there": lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
    "number of the host": lambda x: x * torch.tensor(2.0),
}
WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "list": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.zeros(3).to(x),
    "copy_": lambda x: torch.zeros(3).copy_(x),
}


@pytest.mark.parametrize("case", BAD)
def test_stand_in_refuses(case, strict):
    with pytest.raises((AssertionError, RuntimeError)):
        BAD[case](torch.zeros(3, device=META))


@pytest.mark.parametrize("case", WAITS)
def test_stand_in_counts(case, strict):
    WAITS[case](torch.zeros(3, device=META))
    assert strict.waits == 1
    (torch.zeros(3, device=META) + 1).sum()
    assert strict.waits == 1


def devices(model):
    return {x.device for x in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize("how", ["argument", "to"])
def test_model_moves(how, strict):
    """With all parameters and buffers; so do its input, its output and the gradients."""
    network = ddpm.MyUNet()
    model = (
        ddpm.MyDDPM(network, device=META) if how == "argument" else ddpm.MyDDPM(network).to(META)
    )
    assert devices(model) == {META} and model.device == META
    strict.waits = 0
    x0, t = torch.randn(5, 1, 28, 28, device=META), torch.arange(5, device=META)
    noisy = model(x0, t)
    out = model.backward(noisy, t[:, None])
    assert noisy.device == out.device == META and out.shape == x0.shape
    out.square().mean().backward()
    assert {p.grad.device for p in model.parameters()} == {META}
    assert strict.waits == 0
    model(x0, 3)
    model(x0, [3] * 5, torch.randn_like(x0))


def train(n_batches, store_path, place=META, kind=ddpm.Muon):
    model = ddpm.MyDDPM(ddpm.MyUNet(100), 100, device=META)
    images = torch.zeros(4 * n_batches - 1, 28, 28, dtype=torch.uint8, device=place)
    loader, optim = ddpm.Batches(images, 4), kind(model.parameters(), 0.01)
    assert {batch[0].device for batch in loader} == {place}
    losses = ddpm.training_loop(model, loader, 1, optim, META, store_path=store_path)
    assert devices(model) == {META} and len(losses) == 1
    state = [x for x in tree_leaves(optim.state_dict()) if isinstance(x, torch.Tensor) and x.ndim]
    assert {x.device for x in state} == ({META} if kind is ddpm.Muon else set())


def test_training_waits_once_an_epoch(strict, tmp_path):
    """The host asks for no number in the loop over the batches, and sends none."""
    waits = []
    for n_batches in (2, 4):
        strict.waits = 0
        train(n_batches, tmp_path / "a.pt")
        waits.append(strict.waits)
    assert 1 <= waits[0] == waits[1]


def test_training_on_batches_of_the_host(strict, tmp_path):
    """As a DataLoader gives them, and with an optimizer of torch."""
    train(2, tmp_path / "a.pt", CPU, torch.optim.SGD)


@pytest.mark.parametrize("whole_chain", [False, True])
@pytest.mark.parametrize("variance", [1, 2])
def test_sampling_does_not_wait(whole_chain, variance, strict):
    """The host asks for no number in the loop over the steps, and sends none."""
    waits = []
    for n_steps in (6, 12):
        model = ddpm.MyDDPM(ddpm.MyUNet(n_steps), n_steps)
        model.early = ddpm.MyUNet(n_steps)
        model.to(META)
        noise, steps = (
            torch.randn(3, 1, 28, 28, device=META),
            n_steps if whole_chain else n_steps // 2,
        )
        strict.waits = 0
        seen = list(ddpm.reverse_process(model, noise, steps, 2, variance, None))
        assert len(seen) == steps + 1
        assert {(x.device, x.dtype, x.shape) for x in seen} == {(META, torch.float32, noise.shape)}
        waits.append(strict.waits)
    assert waits[0] == waits[1]


def test_whole_program(strict, tmp_path):
    """Everything between the archive and the pictures finds the device."""
    argv = ["--n-images", "40", "--batch-size", "16", "--n-epochs", "2", "--n-samples", "5"]
    argv += ["--sample-steps", "3", "--out-dir", str(tmp_path)]
    ddpm.run(ddpm.read_flags(argv), META)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"mnist.pt", "mnist_state.pt", "mnist.gif", "mnist_forward.png"} <= names


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps", "xpu"])
def test_precision_of_every_device(name):
    """The question is answered even where there is no such device."""
    with ddpm.fast_precision(torch.device(name)):
        x = torch.ones(2, 2) @ torch.ones(2, 2)
    assert x.dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "rank, count, index", [(None, 1, 0), ("0", 2, 0), ("1", 2, 1), ("7", 8, 7)]
)
def test_each_process_takes_its_own_gpu(rank, count, index, monkeypatch):
    used = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    answer = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **how: answer)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert ddpm.find_device() == torch.device("cuda", index)
    assert used == [torch.device("cuda", index)]


@pytest.mark.parametrize("found, device", [(None, "cpu"), ("mps", "mps")])
def test_device_without_cuda(found, device, monkeypatch):
    answer = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **how: answer)
    assert ddpm.find_device() == torch.device(device)
