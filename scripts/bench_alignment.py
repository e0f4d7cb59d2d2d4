"""python scripts/bench_alignment.py [step|layers|fit]: what aligning costs on this machine.

step    one STRUCTURE regulariser, forward and backward, beside the matrix products and softmaxes that it needs
layers  mutual-kNN scores of 12 x 6 layers on 5,000 rows
fit     300 steps of `align` on 1,000 pairs, beside the closed forms
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from mmalign.alignment import align
from mmalign.layer_selection import layer_scores
from mmalign.structure import structure_loss


def best_of(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several runs, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def clustered(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, width, generator=generator)
    return centres[torch.randint(50, (rows,), generator=generator)] + 0.6 * torch.randn(
        rows, width, generator=generator
    )


def step(repeats: int) -> None:
    features = clustered(1024, 384, 0)
    outputs = torch.randn(1024, 512, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))

    def bare() -> None:
        # Two Gram matrices and softmaxes, and the backward pass of the one that has a gradient.
        torch.softmax(normalize(features) @ normalize(features).T / 0.05, dim=1)
        z = normalize(outputs)
        torch.autograd.grad(torch.softmax(z @ z.T / 0.05, dim=1), outputs, weight)

    def ours() -> None:
        torch.autograd.grad(structure_loss(features, outputs), outputs)

    needed, taken = best_of(bare, repeats), best_of(ours, repeats)
    print(f"structure, 1024 x 384 -> 512, L = 1, {torch.get_num_threads()} threads")
    print(f"  bare products and softmaxes  {1000 * needed:7.1f} ms")
    print(f"  structure_loss               {1000 * taken:7.1f} ms   {taken / needed:.2f} x")


def layers(repeats: int) -> None:
    images = [clustered(5000, 768, seed).half() for seed in range(12)]
    texts = [clustered(5000, 384, seed).half() for seed in range(6)]
    taken = best_of(lambda: layer_scores(images, texts), min(repeats, 2))
    print(f"layer scores, 12 x 6 layers, 5,000 rows, k = {math.ceil(2 * 5000 ** (1 / 3))}: {taken:.1f} s")


def fit(_: int) -> None:
    images, texts = clustered(1000, 768, 0).numpy(), clustered(1000, 384, 0).numpy()
    for method, options in (("structure", {"steps": 300}), ("clip", {"steps": 300}), ("cca", {}), ("ridge", {})):
        start = time.perf_counter()
        align(images, texts, method=method, device="cpu", **options)
        print(f"align, 1,000 pairs, {method:<10} {time.perf_counter() - start:6.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["step", "layers", "fit"], default=["step", "layers", "fit"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.what:
        {"step": step, "layers": layers, "fit": fit}[name](given.repeats)


if __name__ == "__main__":
    main()
