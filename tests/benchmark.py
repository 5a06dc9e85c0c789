"""How fast is it? Run by hand, on an idle Linux machine: python tests/benchmark.py [--whole]

Columns are this processor and, where it has AVX-512, one with AVX2 that it imitates, each in a
process of its own. Columns take turns, so that the machine's moods meet both. A cell is the median
(smallest to largest), and its ratio to the first column. "Plain" is the same network in the
report's loop: images one by one, Adam, and a wait for the loss in each step.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from ablation import train
from quality import DEVICE, ROOT, clock, ddpm, quietly
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import MNIST


def seconds_of(function, *args, **kwargs):
    start = clock()
    function(*args, **kwargs)
    return clock() - start


def new_model():
    """-> untrained model: trained weights would be neither faster nor slower."""
    return ddpm.MyDDPM(ddpm.MyUNet(), device=DEVICE)


def plain_seconds(n):
    """-> seconds of a pass over n images in the report's training loop."""
    model = new_model()
    optim = torch.optim.Adam(model.parameters(), 1e-3)
    steps = [transforms.ToTensor(), transforms.Lambda(lambda x: (x - 0.5) * 2)]
    dataset = Subset(MNIST(ddpm.data_dir, transform=transforms.Compose(steps)), range(n))
    start = clock()
    for batch in DataLoader(dataset, batch_size=128, shuffle=True):
        x0 = batch[0].to(DEVICE)
        eta = torch.randn(x0.shape).to(DEVICE)
        t = torch.randint(0, model.n_steps, (len(x0),)).to(DEVICE)
        eta_theta = model.backward(model(x0, t, eta), t.reshape(len(x0), -1))
        loss = F.mse_loss(eta_theta, eta)
        optim.zero_grad()
        loss.backward()
        optim.step()
        loss.item()
    return clock() - start


def training_times(n):
    """-> mean ms of the parts of a step, and images a second, of the plain loop, too.

    The rest is data, rates, the check at the start and the file at the end.
    """
    dataset, spent = ddpm.load_data(), {"forward": 0, "backward": 0, "optimizer": 0}

    def timed(part, function):
        def run(*args, **kwargs):
            start = clock()
            result = function(*args, **kwargs)
            spent[part] += clock() - start
            return result

        return run

    loss = timed("forward", ddpm.denoising_loss)
    with (
        mock.patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)),
        mock.patch.object(ddpm.Muon, "step", timed("optimizer", ddpm.Muon.step)),
    ):
        whole = quietly(train, dataset, n, 0, loss=loss)[1]
    parts = {**spent, "rest": whole - sum(spent.values()), "whole": whole}
    step, n_steps = f"step of {ddpm.batch_size} images", n / ddpm.batch_size
    found = {f"{step}, ms: {part}": 1000 * s / n_steps for part, s in parts.items()}
    plain = plain_seconds(n)
    return found | {
        "training, images/s": n / whole,
        "plain, images/s": n / plain,
        "ratio": plain / whole,
    }


def muon_times():
    """-> ms of a step of our Muon and torch's, for the weights of the network as matrices."""
    found = {}
    theirs = partial(torch.optim.Muon, ns_steps=3)  # as ours has
    for name, muon in (("Muon", ddpm.Muon), ("torch.optim.Muon", theirs)):
        weights = new_model().network.parameters()
        matrices = [p.detach().flatten(1).requires_grad_() for p in weights]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        optim = muon(matrices)
        optim.step()  # the first one makes its means
        found[f"{name}, ms a step"] = 1000 * seconds_of(optim.step)
    return found


def drawing_time(n, steps):
    """-> seconds of drawing n images in one batch."""
    how = {"guidance": ddpm.guidance, "sample_steps": steps, "gif_name": None}
    seconds = seconds_of(quietly, ddpm.generate_new_images, new_model(), n, **how)
    return {f"{n:,} images in {steps:,} steps, s": seconds}


def command_time(*flags):
    """-> seconds of `python ddpm.py` in a folder with untrained weights."""
    with tempfile.TemporaryDirectory() as folder:
        ddpm.store(Path(folder, "mnist.pt"), new_model(), [])
        command = [sys.executable, "ddpm.py", *flags, "--out-dir", folder]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        seconds = seconds_of(subprocess.run, command, cwd=ROOT, check=True, **nowhere)
    return {f"{' '.join(['python ddpm.py', *flags])}, s": seconds}


def forward_flop(n=8):
    """-> floating-point operations of the network for one image."""
    x = torch.zeros(n, 1, 28, 28, device=DEVICE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        new_model().backward(x, 0)
    return counter.get_total_flops() / n


def peak_memory(n_drawn):
    """-> peak of this process (on CUDA: of its tensors), in MB; 0 drawn is a short training."""
    if n_drawn:
        drawing_time(n_drawn, 2)
    else:
        quietly(train, ddpm.load_data(), 4 * ddpm.batch_size, 0)
    what = f"{n_drawn:,} images in 2 steps" if n_drawn else "training"
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # Linux only
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return {f"peak memory of {what}, MB": peak / 1e6}


def new_process(environment):
    """-> pool of one process, which imitates a lesser processor if the environment says so."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, environment):
        pool.submit(os.getpid).result()  # which starts the process
    return pool


def row(label, columns):
    """Prints a cell for the list of values of each column."""
    cells = []
    for values in columns:
        middle, low, high = (f(values) for f in (statistics.median, min, max))
        spread = f" ({low:,.2f} to {high:,.2f})" if len(values) > 1 else ""
        ratio = f" x{middle / statistics.median(columns[0]):.2f}" if cells else ""
        cells.append(f"{middle:,.2f}{spread}{ratio}")
    print(f"{label:48}" + "".join(f"{cell:>36}" for cell in cells), flush=True)


def measure(pools, repeats, function, *args):
    """Lets the processes take turns, of several the first to warm up. -> medians of each row."""
    turns = [[pool.submit(function, *args).result() for pool in pools] for _ in range(repeats)]
    found = {}
    for label in turns[0][0]:
        columns = [[one[label] for one in column] for column in zip(*turns[1:] or turns)]
        row(label, columns)
        found[label] = [statistics.median(values) for values in columns]
    return found


def measure_all(pools, repeats, n, few_steps, all_steps):
    """Prints all rows, the last of them an estimate of the default command."""
    rates = measure(pools, repeats, training_times, n)["training, images/s"]
    measure(pools, 4 * repeats, muon_times)
    for steps in few_steps:
        [few] = measure(pools, repeats, drawing_time, 100, steps).values()
    [full] = measure(pools, 1, drawing_time, 100, all_steps).values()
    command = ["--no-train", "--sample-steps", str(few_steps[-1])]
    [whole] = measure(pools, repeats, command_time, *command).values()
    total = ddpm.n_epochs * ddpm.n_images
    times = zip(rates, full, whole, few, strict=True)
    minutes = [[(total / rate + chain + start - part) / 60] for rate, chain, start, part in times]
    row("ESTIMATE from these: python ddpm.py, min", minutes)


def processor():
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return re.search(r"model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the speed and memory of ddpm.py.")
    parser.add_argument("--repeats", type=int, default=6, help="turns, the first to warm up")
    parser.add_argument("--quick", action="store_true", help="only to see that all of it works")
    parser.add_argument("--whole", action="store_true", help="time the default command, too")
    args = parser.parse_args(argv)
    ddpm.load_data()  # unpacks the archives
    count = sum(p.numel() for p in new_model().parameters())
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"network: {count:,} parameters, {forward_flop() / 1e6:.1f} MFLOP an image (forward)")
    kinds = {"native": {}}
    if DEVICE.type == "cpu" and torch.cpu.get_capabilities().get("avx512_f"):
        kinds["AVX2"] = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    print(f"\n{'':48}" + "".join(f"{name:>36}" for name in kinds))
    pools = [new_process(kind) for kind in kinds.values()]
    if args.quick:
        measure_all(pools, 2, 4 * ddpm.batch_size, [2, 3], 4)
    else:
        measure_all(pools, args.repeats, 40 * ddpm.batch_size, [20, 50], ddpm.n_steps)
    if args.whole:
        flags = ["--n-images=256", "--n-epochs=1", "--sample-steps=4"] if args.quick else []
        measure(pools, 1, command_time, *flags)
    for n_drawn in (0, 200 if args.quick else 10_000):
        fresh = [new_process(kind) for kind in kinds.values()]  # a peak stays
        measure(fresh, 1, peak_memory, n_drawn)


if __name__ == "__main__":
    main()
