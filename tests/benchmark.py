"""How fast is it? Run by hand on an idle machine: python tests/benchmark.py (about 4 minutes)

`ddpm.py` as it is against "plain": the same network in the report's training loop, with images
read one by one, Adam, and fp32. The two take turns, so that the machine's moods meet both.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ["MPLBACKEND"] = "agg"  # a window would wait to be closed

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import MNIST

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddpm

DEVICE = ddpm.find_device()
BATCH = 128


def clock():
    """-> seconds, read when the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, *args, **kwargs):
    """-> seconds that the call takes; what it prints is thrown away."""
    start = clock()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        function(*args, **kwargs)
    return clock() - start


def in_turn(functions, repeats):
    """Calls each once to warm up, then A B A B ... -> for each the list of what it returned."""
    for function in functions:
        function()
    rounds = [[function() for function in functions] for _ in range(repeats)]
    return list(zip(*rounds, strict=True))


def new_model():
    """-> untrained model: trained weights would be neither faster nor slower."""
    return ddpm.MyDDPM(ddpm.MyUNet(ddpm.n_steps), ddpm.n_steps, device=DEVICE)


def fp32(device):
    """Stands in for ddpm.fast_precision in the plain runs."""
    return torch.autocast(device.type, enabled=False)


def report_data(folder):
    """-> torchvision data set of (1, 28, 28) images in [-1, 1], unpacked in `folder`."""
    shutil.copytree(ROOT / "datasets" / "MNIST", Path(folder, "MNIST"))
    steps = [transforms.ToTensor(), transforms.Lambda(lambda x: (x - 0.5) * 2)]
    return MNIST(folder, download=True, transform=transforms.Compose(steps))


def report_epoch(model, loader, optim):
    """The training loop of the report: one pass over `loader`."""
    for batch in loader:
        x0 = batch[0].to(DEVICE)
        n = len(x0)
        eta = torch.randn(x0.shape).to(DEVICE)
        t = torch.randint(0, model.n_steps, (n,)).to(DEVICE)
        eta_theta = model.backward(model(x0, t, eta), t.reshape(n, -1))
        loss = F.mse_loss(eta_theta, eta)
        optim.zero_grad()
        loss.backward()
        optim.step()
        loss.item()


def forward_flop(n=8):
    """-> floating-point operations of one call of the network, for each image."""
    x, t = torch.zeros(n, 1, 28, 28, device=DEVICE), torch.zeros(n, device=DEVICE).long()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        new_model().backward(x, t)
    return counter.get_total_flops() / n


def product_rate():
    """-> operations a second of a 2048 x 2048 matrix product in the precision of the training."""
    with ddpm.fast_precision(DEVICE):
        bf16 = torch.is_autocast_enabled(DEVICE.type)
    a, b = torch.randn(2, 2048, 2048, device=DEVICE).to(torch.bfloat16 if bf16 else torch.float32)
    times = [seconds_of(lambda: [a @ b for _ in range(10)]) / 10 for _ in range(10)]
    return 2 * 2048**3 / min(times)


def number(x):
    """-> three digits, or all those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def spread(values):
    """-> median (smallest to largest)"""
    middle, low, high = (number(f(values)) for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def row(label, *cells):
    print(f"{label:44}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


def processor():
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else f"model name: {platform.processor()}"
    found = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    return f"{re.search(r'model name.*: (.*)', text)[1]} ({', '.join(found) or 'no bf16'})"


def measure_training(repeats, n):
    """Images a second of both programs, and the share of the machine's product rate."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = TensorDataset(*ddpm.load_data(device=DEVICE)[:n])
        model, plain = new_model(), new_model()
        optims = ddpm.make_optimizers(model.network, ddpm.lr)
        optim = torch.optim.Adam(plain.parameters(), 1e-3)
        loader = ddpm.batches(dataset, BATCH)
        slow_loader = DataLoader(Subset(report_data(folder), range(n)), BATCH, shuffle=True)
        path = Path(folder, "weights.pt")

        def run():
            how = {"store_path": path}
            return n / seconds_of(ddpm.training_loop, model, loader, 1, optims, **how)

        def run_plain():
            with mock.patch.object(ddpm, "fast_precision", fp32):
                return n / seconds_of(report_epoch, plain, slow_loader, optim)

        ours, theirs = in_turn([run, run_plain], repeats)
    row("training, images/s: ddpm.py, plain, ratio", spread(ours), spread(theirs))
    row("", spread([a / b for a, b in zip(ours, theirs, strict=True)]))
    # The backward pass costs two forward passes; the optimizer's products are not counted.
    rate, limit = statistics.median(ours) * 3 * forward_flop(), product_rate()
    row("GFLOP/s: training, 2048 x 2048 product, share", f"{rate / 1e9:.0f}", f"{limit / 1e9:.0f}")
    row("", f"{rate / limit:.0%}")


def measure_drawing(repeats):
    """Seconds for 100 images with the default guidance, by number of steps."""
    model = new_model().eval()
    for steps in (20, 50, 0):
        how = {"gif_name": None, "sample_steps": steps}

        def run(how=how):
            return seconds_of(ddpm.generate_new_images, model, 100, DEVICE, **how)

        times = in_turn([run], repeats)[0] if steps else [run()]
        row(f"100 images, {steps or ddpm.n_steps} steps, s", spread(times))


def measure_starting(repeats):
    """Seconds of whole commands, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "outputs" / "mnist.pt", folder)
        draw = ["ddpm.py", "--no-train", "--sample-steps", "20", "--out-dir", folder]
        for command in (["-c", "import ddpm"], ["ddpm.py", "--help"], draw):
            whole = [sys.executable, *command]
            how = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
            times = [seconds_of(subprocess.run, whole, **how) for _ in range(repeats)]
            row(f"python {' '.join(command[:4])}, s".replace("\n", " "), spread(times))


def peak_memory(queue, n, training):
    """Puts this process's peak in MB after one training step, or drawing n images in 2 steps."""
    model = new_model()
    if training:
        images = torch.zeros(n, 1, 28, 28, device=DEVICE)
        ddpm.denoising_loss(model, images)[0].backward()
    else:
        ddpm.generate_new_images(model, n, DEVICE, gif_name=None, sample_steps=2)
    text = Path("/proc/self/status").read_text()
    queue.put(int(re.search(r"VmHWM:\s+(\d+)", text)[1]) * 1024 / 1e6)


def measure_memory():
    context = multiprocessing.get_context("spawn")
    for label, n, training in (
        ("training", BATCH, True),
        ("1", 1, False),
        ("10,000", 10_000, False),
    ):
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(queue, n, training))
        process.start()
        row(f"peak memory, {label}{' images' * (not training)}, MB", f"{queue.get():.0f}")
        process.join()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the speed and memory of ddpm.py.")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--n", type=int, default=80 * BATCH, help="images a turn (%(default)s)")
    args = parser.parse_args(argv)
    count = sum(p.numel() for p in new_model().parameters())
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"network: {count:,} parameters, {forward_flop() / 1e6:.1f} MFLOP an image (forward)")
    print(f"medians (smallest to largest) of {args.repeats}\n")
    measure_training(args.repeats, args.n)
    measure_drawing(args.repeats)
    measure_starting(args.repeats)
    measure_memory()


if __name__ == "__main__":
    main()
