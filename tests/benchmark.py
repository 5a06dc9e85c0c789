"""How fast is it, and what does it cost? Run by hand: python tests/benchmark.py (about 6 minutes)

`ddpm.py` as shipped against "plain": the same network in the report's training loop, with images
read one by one, Adam, fp32, and weights in the contiguous memory format. The two take turns, so
that a change in the machine's speed meets both.
"""

import argparse
import concurrent.futures
import contextlib
import io
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
import time
from pathlib import Path
from unittest import mock

os.environ["MPLBACKEND"] = "agg"  # a window would wait to be closed

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import MNIST

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddpm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHTS = ROOT / "outputs" / "mnist.pt"
BATCH = 128  # images a step in both loops, as in the report


# Measuring
def clock():
    """-> seconds, read when the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, *args, **kwargs):
    """-> seconds that the call takes; what it prints is shown only if it fails."""
    text, start = io.StringIO(), clock()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            function(*args, **kwargs)
    except BaseException:
        print(text.getvalue(), file=sys.stderr)
        raise
    return clock() - start


def with_memory(function, *args):
    """-> what function(*args) returns, then this process's peaks: MB resident, MB on the GPU."""
    result, status = function(*args), Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its maximum starts at that of the process that started this one.
        resident = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    else:
        import resource  # which Windows lacks

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    on_gpu = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    return result, resident / 1e6, on_gpu / 1e6


def in_child(function, *args):
    """`with_memory` in a new process, so that nothing done before counts."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(with_memory, function, *args).result()


def in_turn(functions, repeats):
    """Calls A B A B ... -> for each function the list of what it returned."""
    rounds = [[function() for function in functions] for _ in range(repeats)]
    return list(zip(*rounds, strict=True))


# The two programs
class Plain(ddpm.MyDDPM):
    """MyDDPM whose network computes in fp32 with weights in the contiguous memory format."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.to(memory_format=torch.contiguous_format)

    def backward(self, x, *args, **kwargs):
        autocast = torch.autocast(x.device.type, enabled=False)
        with mock.patch.object(ddpm, "fast_precision", lambda device: autocast):
            return super().backward(x, *args, **kwargs)


def untrained(kind=ddpm.MyDDPM):
    """-> new model; trained weights would be neither faster nor slower."""
    return kind(ddpm.MyUNet(ddpm.n_steps), ddpm.n_steps, device=DEVICE)


def precision():
    """-> "bf16" or "fp32", whichever the network as shipped computes in here."""
    with ddpm.fast_precision(DEVICE):
        return "bf16" if torch.is_autocast_enabled(DEVICE.type) else "fp32"


def report_data(folder):
    """-> torchvision data set of (1, 28, 28) images in [-1, 1], unpacked in `folder`."""
    shutil.copytree(Path(ddpm.data_dir, "MNIST"), Path(folder, "MNIST"))
    steps = [transforms.ToTensor(), transforms.Lambda(lambda x: (x - 0.5) * 2)]
    return MNIST(folder, download=True, transform=transforms.Compose(steps))


def report_epoch(model, loader, optim):
    """The training loop of the report, without its progress bar: one pass over `loader`."""
    total = 0.0
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
        total += loss.item() * n / len(loader.dataset)
    return total


def training_runs(folder):
    """-> two functions, shipped and plain: number of images -> seconds to train on them once."""
    images = ddpm.load_images(device=DEVICE)
    shipped, plain, data = untrained(), untrained(Plain), report_data(folder)

    def run_shipped(n):
        loader = ddpm.Batches(images[:n], BATCH)
        optim = ddpm.Muon(shipped.parameters(), ddpm.lr)
        path = Path(folder, "shipped.pt")
        return seconds_of(ddpm.training_loop, shipped, loader, 1, optim, store_path=path)

    def run_plain(n):
        loader = DataLoader(Subset(data, range(n)), BATCH, shuffle=True)
        return seconds_of(report_epoch, plain, loader, torch.optim.Adam(plain.parameters()))

    return run_shipped, run_plain


def images_for(run, seconds):
    """-> number of images, in whole batches, that `run` needs about `seconds` for; warms it up."""
    run(BATCH)
    n, spent = BATCH, 0
    while spent < seconds / 8 and n < 30_000:
        n *= 2
        spent = run(n)
    return max(1, int(min(n * seconds / spent, 60_000)) // BATCH) * BATCH


def draw(model, n, steps):
    """-> seconds to draw n images in `steps` steps."""
    steps = None if steps == model.n_steps else steps
    if model.early is None:
        model.early = model.network  # guided as by default: the second call costs the same
    return seconds_of(ddpm.generate_new_images, model, n, DEVICE, gif_name=None, sample_steps=steps)


# Counts
def forward_flop(n=8):
    """-> floating-point operations of the network's forward pass, for each image."""
    x, t = torch.zeros(n, 1, 28, 28, device=DEVICE), torch.zeros(n, device=DEVICE).long()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        untrained(Plain).backward(x, t)
    return counter.get_total_flops() / n


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, as if nothing stayed in a cache."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            self.bytes += sum(x.nbytes for x in tensors)
        return result


def traffic(training, n=128):
    """-> bytes moved for each image: of one training step, or of one call of the network."""
    model, x0 = untrained(), torch.zeros(n, 1, 28, 28, device=DEVICE)
    with Traffic() as mode:
        if training:
            ddpm.guess_the_noise(model, model.network, x0)[0].backward()
        else:
            with torch.no_grad():
                model.backward(x0, torch.zeros(n, device=DEVICE).long())
    return mode.bytes / n


def product_rate(name, seconds):
    """-> FLOP/s of a 2048 x 2048 matrix product, the best of those that fit in `seconds`."""
    in_a_row = 50 if DEVICE.type == "cuda" else 1  # starting a single one takes a GPU too long
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    a, b = torch.randn(2, 2048, 2048, device=DEVICE).to(dtype)
    times, end = [], clock() + seconds
    while len(times) < 3 or clock() < end:
        start = clock()
        for _ in range(in_a_row):
            a @ b
        times.append((clock() - start) / in_a_row)
    return 2 * 2048**3 / min(times)


# Table
def number(x):
    """-> three significant digits, or all those before the point."""
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


def spread(values):
    """-> median (smallest to largest)"""
    middle, low, high = (number(f(values)) for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def row(label, *cells):
    widths = (24, 24, 22)
    print(f"{label:30}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths)), flush=True)


def heading(label, *cells):
    print()
    row(label, *cells)
    print("-" * 100)


def processor():
    """-> name of the GPU, or of the processor with what it has for products in bf16."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else f"model name: {platform.processor()}"
    name = re.search(r"model name\s*:\s*(.*)|$", text)[1] or platform.machine()
    features = torch.cpu.get_capabilities()
    present = [f for f in ("amx_bf16", "avx512_bf16") if features.get(f)]
    return f"{name} ({', '.join(present) or 'no amx_bf16, no avx512_bf16'})"


def part_train(args):
    """Training of both programs, and how near it comes to the rate of matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        runs = training_runs(folder)
        counts = [images_for(run, args.seconds) for run in runs]
        limits = [product_rate(name, args.seconds / 8) for name in (precision(), "fp32")]
        # The defaults bind each run to its own count.
        timed = [lambda run=run, n=n: n / run(n) for run, n in zip(runs, counts, strict=True)]
        shipped, plain = in_turn(timed, args.repeats)
    heading("training", f"shipped, {precision()}", "plain, fp32", "shipped / plain")
    ratios = [a / b for a, b in zip(shipped, plain, strict=True)]
    row("images/s", spread(shipped), spread(plain), spread(ratios))
    row("images a turn", *(f"{n:,}" for n in counts))
    # The backward pass costs two forward passes; the optimizer's products are not counted.
    rates = [statistics.median(speeds) * 3 * forward_flop() for speeds in (shipped, plain)]
    row("GFLOP/s, 3 x forward", *(number(rate / 1e9) for rate in rates))
    row("GFLOP/s, 2048 x 2048 product", *(number(limit / 1e9) for limit in limits))
    row("share of it", *(f"{a / b:.1%}" for a, b in zip(rates, limits, strict=True)))


def part_sample(args):
    """Both programs with the fast sampler, and the shipped one with the whole chain, once."""
    n, steps, models = 100, args.sample_steps, [untrained().eval(), untrained(Plain).eval()]
    for model in models:
        draw(model, n, 2)  # the first call is slower
    fast, slow = in_turn([lambda m=m: draw(m, n, steps) for m in models], args.repeats)
    heading(f"drawing {n} images", f"shipped, {precision()}", "plain, fp32", "plain / shipped")
    ratios = [b / a for a, b in zip(fast, slow, strict=True)]
    row(f"{steps} steps, seconds", spread(fast), spread(slow), spread(ratios))
    row(f"{steps} steps, images/s", *(spread([n / s for s in times]) for times in (fast, slow)))
    whole = draw(models[0], n, ddpm.n_steps)
    row(f"{ddpm.n_steps} steps, seconds", f"once: {number(whole)}")
    row(f"{ddpm.n_steps} steps, images/s", f"once: {number(n / whole)}")


def first_image(steps):
    """-> seconds from the weights' file (or, without one, from nothing) to one image."""
    start = clock()
    model = ddpm.load_model(WEIGHTS, DEVICE) if WEIGHTS.exists() else untrained().eval()
    draw(model, 1, steps)
    return clock() - start


def part_start(args):
    """Times to start, each in new processes."""
    heading("starting, 3 times each", "seconds")
    quiet = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    for command in (["-c", "import ddpm"], ["ddpm.py", "--help"]):
        times = [seconds_of(subprocess.run, [sys.executable, *command], **quiet) for _ in range(3)]
        row(f"python {' '.join(command)}", spread(times))
    times = [in_child(first_image, args.sample_steps)[0] for _ in range(3)]
    origin = WEIGHTS.name if WEIGHTS.exists() else "untrained"
    row(f"first image, {args.sample_steps} steps", spread(times), f"after import, {origin}")


def draw_warm(n, steps):
    """-> seconds to draw n images, the slower first call not counted."""
    model = untrained().eval()
    draw(model, 1, steps)
    return draw(model, n, steps)


def train_briefly(n):
    """-> seconds of a whole run of `ddpm.py` that trains once on n images."""
    small = ["--n-epochs=1", "--n-samples=10", "--sample-steps=5", "--frames-per-gif=5"]
    with tempfile.TemporaryDirectory() as folder:
        return seconds_of(ddpm.main, [*small, f"--n-images={n}", f"--out-dir={folder}"])


def part_growth(args):
    """Time and peak memory, each line in a process of its own."""
    heading("growth", "seconds", "peak memory, MB", "on the GPU, MB")
    jobs = [(f"drawing {n:,}, 2 steps", draw_warm, n, 2) for n in (1, 10, 100, 1000, 10_000)]
    jobs.append(("training on 3,000, whole run", train_briefly, 3000))
    for label, *job in jobs:
        seconds, memory, on_gpu = in_child(*job)
        row(label, number(seconds), f"{memory:,.0f}", f"{on_gpu:,.0f}" if on_gpu else "-")


def worker(n, steps):
    """Run by each of the processes that share a job: prints images/s of training and drawing."""
    with ddpm.all_processes(DEVICE, BATCH), tempfile.TemporaryDirectory() as folder:
        images = ddpm.load_images(device=DEVICE)
        for count in (2 * BATCH, n):  # the first round warms up
            model = untrained()
            job = (model, ddpm.Batches(images[:count], BATCH), 1, ddpm.Muon(model.parameters()))
            path = Path(folder, "model.pt")
            training = count / seconds_of(ddpm.training_loop, *job, store_path=path)
            drawing = 100 / draw(model.eval(), 100, 2 if count < n else steps)
        print(training, drawing)


def part_processes(args):
    """One and two processes of one thread each, against one process of two threads."""

    def speeds(processes, threads):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        command += [__file__, "--worker", f"--sample-steps={args.sample_steps}"]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        return [float(word) for word in done.stdout.split()]

    jobs = {"1 process, 2 threads": (1, 2), "1 process, 1 thread": (1, 1)}
    jobs["2 processes, 1 thread each"] = (2, 1)
    results = in_turn([lambda job=job: speeds(*job) for job in jobs.values()], args.repeats)
    for i, name in enumerate(("training", "drawing")):
        heading(f"{name} in processes", "images/s", "ratio to the first")
        for label, rounds in zip(jobs, results, strict=True):
            ratios = [a[i] / b[i] for a, b in zip(rounds, results[0], strict=True)]
            row(label, spread([speed[i] for speed in rounds]), spread(ratios))


PARTS = {"train": part_train, "sample": part_sample, "start": part_start, "growth": part_growth}
PARTS["processes"] = part_processes


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure speed and memory of ddpm.py.")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="a training turn (%(default)s)")
    parser.add_argument("--sample-steps", type=int, default=20, help="fast sampler (%(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(20 * BATCH, args.sample_steps)
    if args.repeats < 1 or args.seconds <= 0 or not 1 <= args.sample_steps < ddpm.n_steps:
        parser.error(f"repeats and seconds must be above 0, sample-steps 1 to {ddpm.n_steps - 1}")
    count = sum(p.numel() for p in untrained().parameters())
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"network: {count:,} parameters, {forward_flop() / 1e6:.1f} MFLOP an image (forward)")
    moved = (traffic(training) / 1e6 for training in (False, True))
    print("read and written: {:.1f} MB an image forward, {:.1f} MB in training".format(*moved))
    print(f"medians (smallest to largest) of {args.repeats}, shipped and plain in turn")
    for name, part in PARTS.items():
        if args.part in (name, "all"):
            part(args)


if __name__ == "__main__":
    main()
