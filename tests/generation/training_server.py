"""Forks a child for each line of its input: `DATA<TAB>OUTPUT`; the child trains there, or goes on with it.

Answers are the process id and, when the child is dead, its status. Nothing is run before the forks, so that no thread
can be lost by them.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import torch

torch.set_num_threads(1)

from generation.methods import MaPOConfig, MaPOTrainer  # noqa: E402  (threads are set before anything can start some)


def work(data: str, output: str) -> None:
    settings = {"model": "tiny:sdxl", "resolution": 64, "steps": 12, "batch_size": 2, "accumulation": 2, "rank": 4}
    looking = {"checkpoint_every": 2, "keep_checkpoints": 2, "probe_every": 4, "probe_size": 2}
    rest = {"device": "cpu", "learning_rate": 1e-3, "random_flip": True, "workers": 2}
    MaPOTrainer(MaPOConfig(data=data, output=Path(output), **settings, **looking, **rest)).train()


def main() -> None:
    for name in ("diffusers", "peft", "accelerate", "matplotlib.figure", "open_clip", "torchvision.transforms.v2"):
        import_module(name)
    for line in sys.stdin:
        data, output = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(data, output)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


main()
