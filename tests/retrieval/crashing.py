"""Work in a child process that is killed on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
# (job, folder, out, step to die at or -1, seconds after which to be killed) -> (exit status, durable actions taken)
Run = Callable[[str, Path, Path, int, float | None], tuple[int, int]]


def serve() -> Iterator[Run]:
    """Does a job of `crash_server` in a child process, which may be killed on the way."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    server = subprocess.Popen(
        [sys.executable, str(HERE / "crash_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )

    def work(job: str, folder: Path, out: Path, step: int = -1, seconds: float | None = None) -> tuple[int, int]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{job}\t{folder}\t{out}\t{step}\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
        status, actions = server.stdout.readline().split()
        return int(status), int(actions)

    yield work
    assert server.stdin is not None
    server.stdin.close()
    server.wait(10)
