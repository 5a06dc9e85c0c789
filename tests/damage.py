"""Damages files at random: every change must end in a clear line, never in a wrong result.

python tests/damage.py [--n 300] [--seed 0]
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ddpm

GOOD = {"BadInput", "identical"}


def cut(data, chance):
    """Loses the end, or a piece."""
    start = chance.randrange(len(data))
    end = chance.choice([len(data), start + chance.randint(1, 1000)])
    return data[:start] + data[end:]


def flip(data, chance):
    """Changes one bit, or up to eight bytes."""
    start = chance.randrange(len(data))
    old = data[start : start + chance.randint(1, 8)]
    if chance.random() < 0.5:
        piece = bytes([old[0] ^ 1 << chance.randrange(8)])
    else:
        piece = bytes(byte ^ chance.randint(1, 255) for byte in old)
    return data[:start] + piece + data[start + len(piece) :]


def insert(data, chance):
    """Gains up to 1000 bytes, one in four times at the end."""
    start = chance.choice([len(data)] + 3 * [chance.randrange(len(data))])
    return data[:start] + chance.randbytes(chance.randint(1, 1000)) + data[start:]


def attack(path, read, same, n, seed):
    """-> Counter of (change, ending) over `n` random changes of the file `path`.

    `read()` uses the file; what it returns is identical if `same(result)`.
    """
    chance = random.Random(seed)
    good = path.read_bytes()
    endings = Counter()
    for i in range(n):
        change = (cut, flip, insert)[i % 3]
        bad = change(good, chance)
        path.write_bytes(bad)
        try:
            ending = "identical" if same(read()) else "another result"
        except ddpm.BadInput as error:
            clear = path.name in str(error) and "\n" not in str(error)
            ending = "BadInput" if clear else "BadInput that doesn't name the file"
        except Exception as error:  # noqa: BLE001 - any other ending is a failure to count
            ending = type(error).__name__
        if path.read_bytes() != bad:
            ending += ", file touched"
        endings[change.__name__, ending] += 1
    path.write_bytes(good)
    return endings


def equal(one, two):
    """-> are two state dicts the same, bit by bit?"""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def main(argv=None):
    """Prints what the changes ended in. -> 1 if any ended badly, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=300, help="changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    endings = Counter()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "MNIST", "raw", "train-images-idx3-ubyte.gz")
        archive.parent.mkdir(parents=True)
        shutil.copy(ROOT / "datasets" / archive.relative_to(folder), archive)
        images = ddpm.load_images(data_dir=folder)

        weights, state = Path(folder, "mnist.pt"), Path(folder, "mnist_state.pt")
        loader = ddpm.Batches(images[:8], 8)

        def train(resume):
            torch.manual_seed(args.seed)
            model = ddpm.MyDDPM(ddpm.MyUNet())
            optim = torch.optim.Adam(model.parameters(), 1e-3)
            ddpm.training_loop(
                model, loader, 1 + resume, optim, store_path=weights, flags={"resume": resume}
            )
            return model.state_dict()

        before = train(resume=False)
        targets = {
            "weights": (
                weights,
                lambda: ddpm.load_model(weights).state_dict(),
                lambda result: equal(result, before),
            ),
            "state": (state, lambda: train(resume=True), lambda result: False),
            "archive": (
                archive,
                lambda: ddpm.load_images(data_dir=folder),
                lambda result: torch.equal(result, images),
            ),
        }
        for name, (path, read, same) in targets.items():
            for (change, ending), k in attack(path, read, same, args.n, args.seed).items():
                endings[name, change, ending] += k

    print(f"{'file':<10}{'change':<10}{'tried':>6}  ended in")
    for (name, change, ending), k in endings.items():
        print(f"{name:<10}{change:<10}{k:>6}  {ending}")
    failures = sum(k for (_, _, ending), k in endings.items() if ending not in GOOD)
    print(f"{endings.total()} changes, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
