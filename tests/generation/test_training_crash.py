"""Runs killed by SIGKILL at random moments, and runs shared by two processes: the end is that of a run left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SERVER = Path(__file__).with_name("training_server.py")


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield process
        assert process.stdin
        process.stdin.close()


def train(
    server: subprocess.Popen[str], data: Path, output: Path, kill_after: float | None = None
) -> tuple[int, float]:
    """Exit status of one child, -9 if it was killed in time, and how long it lived."""
    assert server.stdin
    assert server.stdout
    server.stdin.write(f"{data}\t{output}\n")
    server.stdin.flush()
    child = int(server.stdout.readline())
    born = time.monotonic()
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return int(server.stdout.readline()), time.monotonic() - born


def outcome(output: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("step_seconds", "peak_memory_gb")
    rows = [{key: value for key, value in row.items() if key not in timed} for row in rows]
    return rows, load_file(output / "export" / "pytorch_lora_weights.safetensors")


def test_runs_killed_at_random_moments_end_as_the_undisturbed_one(server, photo_pairs, tmp_path):
    status, length = train(server, photo_pairs, tmp_path / "whole" / "run")
    assert status == 0
    expected, weights = outcome(tmp_path / "whole" / "run")

    moments, kills = random.Random(0), 0
    for attempt in range(3):
        # With a cache of its own, so that checking and encoding are hit as well.
        output = tmp_path / f"killed-{attempt}" / "run"
        for _ in range(5):
            killed, _ = train(server, photo_pairs, output, kill_after=moments.uniform(0, length / 2))
            kills += killed == -signal.SIGKILL
        assert train(server, photo_pairs, output)[0] == 0
        rows, ended = outcome(output)
        assert rows == expected
        assert ended.keys() == weights.keys()
        assert all(torch.equal(ended[key], weights[key]) for key in weights)
        assert len(list((output / "checkpoints").iterdir())) == 2
    assert kills >= 9


@pytest.mark.parametrize("method", ["mapo", "draft", "grpo"])
def test_two_processes_train_what_one_does_with_twice_the_accumulation(method, photo_pairs, tmp_path):
    """`draft` and `grpo` call the network through a pipeline, past the wrapper that averages gradients."""
    options = ["--model", "tiny:sdxl", "--resolution", "64", "--steps", "4", "--rank", "4", "--learning-rate", "1e-3"]
    options += ["--batch-size", "1", "--checkpoint-every", "2", "--probe-size", "2", "--device", "cpu", "--quiet"]
    data = photo_pairs
    if method in ("draft", "grpo"):
        data = tmp_path / "prompts.txt"
        data.write_text("".join(f"a {thing}\n" for thing in ("dog", "boat", "cup", "tree", "fish")))
        options += ["--reward", "redness", "--held-out-reward", "jpeg-incompressibility", "--sampling-steps", "3"]
        options += ["--gradient-steps", "last:2", "--probe-images", "2"] if method == "draft" else []
        if method == "grpo":  # one group, half of it in each process
            options += ["--batch-size", "2", "--group-size", "4", "--updates", "1", "--probe-size", "0"]
    one = [sys.executable, "-m", "mmalign.cli"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mmalign.cli"]
    for command, name, accumulation in ((one, "one", "2"), (two, "two", "1")):
        output = str(tmp_path / name / "run")
        line = [*command, "train", method, str(data), output, *options, "--accumulation", accumulation]
        done = subprocess.run(
            line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("pytorch_lora_weights.safetensors") == 1
    (first, one_), (second, two_) = outcome(tmp_path / "one" / "run"), outcome(tmp_path / "two" / "run")
    for row, other in zip(first, second, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    for key in one_:
        # Adam takes what rounds otherwise as far as a large gradient; a step of it is 1e-3.
        torch.testing.assert_close(one_[key], two_[key], rtol=0, atol=1e-5 if method != "grpo" else 1e-4)
