"""How fast is it? Run by hand on an idle machine: python tests/benchmark.py [--whole]

A column is a kind of processor: this one, and the lesser ones that it can imitate, each in a
process of its own. Columns take turns, and so do the two sides of a comparison, so that the
machine's moods meet all. A cell is the median (smallest to largest), and its ratio to the first
column. "Plain" is the same network in the report's loop: images one by one, Adam, fp32, and with
the program's setting of the memory allocator, which makes it faster, too.
"""

import argparse
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from quality import DEVICE, ROOT, clock, ddpm, draw
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import MNIST


def seconds_of(function, *args, **kwargs):
    start = clock()
    function(*args, **kwargs)
    return clock() - start


def new_model():
    """-> untrained model: trained weights would be neither faster nor slower."""
    model = ddpm.MyDDPM(ddpm.MyUNet(ddpm.n_steps), ddpm.n_steps, device=DEVICE)
    model.mixed_precision = ddpm.mixed_precision
    return model


def training(n):
    """-> what train_epoch takes, with n images in an epoch."""
    model = new_model()
    loader = DataLoader(TensorDataset(*ddpm.load_data()[:n]), ddpm.batch_size, shuffle=True)
    return model, loader, ddpm.Muon(model.network.parameters(), ddpm.lr), 1, 1


def step_parts(n):
    """-> mean ms of the parts of a step, over an epoch; the rest is data and rates."""
    how, spent = training(n), {"forward": 0, "backward": 0, "optimizer": 0}

    def timed(part, function):
        def run(*args, **kwargs):
            start = clock()
            result = function(*args, **kwargs)
            spent[part] += clock() - start
            return result

        return run

    with (
        mock.patch.object(ddpm, "denoising_loss", timed("forward", ddpm.denoising_loss)),
        mock.patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)),
        mock.patch.object(ddpm.Muon, "step", timed("optimizer", ddpm.Muon.step)),
    ):
        whole = seconds_of(list, ddpm.train_epoch(*how))
    parts = {**spent, "rest": whole - sum(spent.values()), "whole": whole}
    step, n_steps = f"step of {ddpm.batch_size} images", n / ddpm.batch_size
    ms = {f"{step}, ms: {part}": 1000 * s / n_steps for part, s in parts.items()}
    return {**ms, f"{step}: whole / both passes": whole / (spent["forward"] + spent["backward"])}


def plain_seconds(folder, n):
    """-> seconds of a pass over n images in the report's training loop."""
    model = new_model()
    model.mixed_precision = False
    optim = torch.optim.Adam(model.parameters(), 1e-3)
    steps = [transforms.ToTensor(), transforms.Lambda(lambda x: (x - 0.5) * 2)]
    dataset = Subset(MNIST(folder, transform=transforms.Compose(steps)), range(n))
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


def training_rates(folder, n):
    """-> images a second of ddpm.py and of the plain loop, and their ratio."""
    ours = n / seconds_of(list, ddpm.train_epoch(*training(n)))
    plain = n / plain_seconds(folder, n)
    return {"training, images/s": ours, "plain, images/s": plain, "ratio": ours / plain}


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
    seconds = seconds_of(draw, new_model(), n, sample_steps=steps)
    return {f"{n:,} images in {steps:,} steps, s": seconds}


def command_time(*flags):
    """-> seconds of `python ddpm.py` in a folder with untrained weights."""
    with tempfile.TemporaryDirectory() as folder:
        ddpm.store(Path(folder, "mnist.pt"), new_model(), [])
        command = [sys.executable, "ddpm.py", *flags, "--out-dir", folder]
        command += [] if ddpm.mixed_precision else ["--no-mixed-precision"]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        seconds = seconds_of(subprocess.run, command, cwd=ROOT, check=True, **nowhere)
    return {f"{' '.join(['python ddpm.py', *flags])}, s": seconds}


def forward_flop(n=8):
    """-> floating-point operations of the network for one image."""
    x, t = torch.zeros(n, 1, 28, 28, device=DEVICE), torch.zeros(n, device=DEVICE).long()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        new_model().backward(x, t)
    return counter.get_total_flops() / n


def product_rate():
    """-> GFLOP/s of a 2048 x 2048 matrix product in the precision of the training."""
    bf16 = ddpm.mixed_precision and ddpm.multiplies_bf16(DEVICE)
    a, b = torch.randn(2, 2048, 2048, device=DEVICE).to(torch.bfloat16 if bf16 else torch.float32)
    seconds = min(seconds_of(torch.matmul, a, b) for _ in range(20))
    return {"product of 2048 x 2048, GFLOP/s": 2 * 2048**3 / seconds / 1e9}


def peak_memory(n_drawn):
    """-> peak of this process (on CUDA: of its tensors), in MB; 0 drawn is a step of training."""
    if n_drawn:
        drawing_time(n_drawn, 2)
    else:
        next(ddpm.train_epoch(*training(ddpm.n_images)))
    what = f"{n_drawn:,} images in 2 steps" if n_drawn else "a step of training"
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    status = Path("/proc/self/status")
    if not peak and status.exists():
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return {f"peak memory of {what}, MB": peak / 1e6 or math.nan}


def set_precision(mixed_precision):
    ddpm.mixed_precision = mixed_precision


def new_process(environment, mixed_precision):
    """-> pool of one process that imitates a lesser processor."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, set_precision, [mixed_precision])
    with mock.patch.dict(os.environ, environment):
        pool.submit(os.getpid).result()  # which starts the process
    return pool


def processors():
    """-> {name: arguments of new_process} of this processor and those that it can imitate."""
    can = torch.cpu.get_capabilities() if DEVICE.type == "cpu" else {}
    found = {"native": ({}, True)}
    if can.get("amx_bf16"):
        limit = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
        found["AVX-512 with bf16, no AMX"] = (limit, True)
    if can.get("avx512_f"):
        limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        found["AVX2, fp32"] = (limits, False)
    return found


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
    """Lets the processes take turns, of several the first to warm up. -> medians in each."""
    turns = [[pool.submit(function, *args).result() for pool in pools] for _ in range(repeats)]
    found = []
    for label in turns[0][0]:
        columns = [[one[label] for one in column] for column in zip(*turns[1:] or turns)]
        row(label, columns)
        found.append([statistics.median(values) for values in columns])
    return found


def measure_all(pools, repeats, n, few_steps, all_steps):
    """Prints all rows, the last of them an estimate of the default command."""
    measure(pools, repeats, step_parts, n)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "datasets" / "MNIST", Path(folder, "MNIST"))
        MNIST(folder, download=True)  # which only unpacks
        rates = measure(pools, repeats, training_rates, folder, n)[0]
    limits = measure(pools, repeats, product_rate)[0]
    # The backward pass costs two forward passes; the optimizer's products are not counted.
    gflop = 3 * forward_flop() / 1e9
    shares = [[100 * rate * gflop / limit] for rate, limit in zip(rates, limits, strict=True)]
    row("of that rate in training, %", shares)
    measure(pools, 4 * repeats, muon_times)
    drawing = [measure(pools, repeats, drawing_time, 100, steps)[0] for steps in few_steps]
    full = measure(pools, 1, drawing_time, 100, all_steps)[0]
    command = ["--no-train", "--sample-steps", str(few_steps[-1])]
    whole = measure(pools, repeats, command_time, *command)[0]
    total = ddpm.n_epochs * ddpm.n_images
    minutes = [
        [(total / rate + chain + start - part) / 60]
        for rate, chain, start, part in zip(rates, full, whole, drawing[-1], strict=True)
    ]
    row("ESTIMATE from these: python ddpm.py, min", minutes)


def processor():
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else f"model name: {platform.processor()}"
    names = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
    found = [name for name in names if torch.cpu.get_capabilities().get(name)]
    return f"{re.search(r'model name.*: (.*)', text)[1]} ({', '.join(found) or 'no AVX2'})"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure the speed and memory of ddpm.py.")
    parser.add_argument("--repeats", type=int, default=6, help="turns, the first to warm up")
    parser.add_argument("--quick", action="store_true", help="only to see that all of it works")
    parser.add_argument("--whole", action="store_true", help="time the default command, too")
    args = parser.parse_args(argv)
    count = sum(p.numel() for p in new_model().parameters())
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"network: {count:,} parameters, {forward_flop() / 1e6:.1f} MFLOP an image (forward)")
    kinds = processors()
    if len(kinds) == 1:
        print("nothing lesser than this processor can be imitated")
    print(f"\n{'':48}" + "".join(f"{name:>36}" for name in kinds))
    pools = [new_process(*kind) for kind in kinds.values()]
    if args.quick:
        measure_all(pools, 2, 4 * ddpm.batch_size, [2, 3], 4)
    else:
        measure_all(pools, args.repeats, 40 * ddpm.batch_size, [20, 50], ddpm.n_steps)
    if args.whole:
        flags = ["--n-images=256", "--n-epochs=1", "--sample-steps=4"] if args.quick else []
        measure(pools, 1, command_time, *flags)
    for n_drawn in (0, 200 if args.quick else 10_000):
        fresh = [new_process(*kind) for kind in kinds.values()]  # a peak stays
        measure(fresh, 1, peak_memory, n_drawn)


if __name__ == "__main__":
    main()
