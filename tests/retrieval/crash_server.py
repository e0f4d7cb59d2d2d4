"""Forks a child for each line of its input: `JOB<TAB>FOLDER<TAB>OUT<TAB>STEP`; the child does its job.

"index" indexes FOLDER into OUT. "upgrade" takes the index OUT, from wherever an earlier child has left it, to the end
of an upgrade from `colour:weak` to `colour:strong`, measured on FOLDER, a file of captions.

The child kills itself with SIGKILL before its STEP-th durable action (fsync, rename or removal of a file in OUT); with
STEP -1 it goes on to the end. Answers are the process id, and when the child is dead its status and the number of
actions it was seen to take. Nothing is run before the forks, so that no thread can be lost by them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from colour_encoder import ColourEncoder
from tiny_encoder import TinyEncoder

from retrieval import ImageIndex, IndexUpgrade
from retrieval.draft import Draft
from retrieval.faiss_module import import_faiss


def index(folder: Path, out: Path) -> None:
    encoder = TinyEncoder()
    encoder.before_batch = lambda: time.sleep(0.002)
    ImageIndex.build(folder, out, encoder=encoder, batch_size=4, workers=2)


def upgrade(captions: Path, out: Path) -> None:
    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    strong.before_batch = lambda: time.sleep(0.005)
    run = IndexUpgrade(out, strong, encoder=weak)
    if run.status().stage == "finished":
        return
    options: dict[str, Any] = {"checkpoint_seconds": 0, "batch_size": 4, "workers": 2}
    if run.status().stage in ("none", "measuring"):
        run.measure(captions, sample=36, **options)
    if run.status().stage == "measured":
        run.start(force=True)
    run.backfill(**options)
    run.finish()


JOBS = {"index": index, "upgrade": upgrade}


def work(job: str, folder: Path, out: Path, step: int, log: int) -> None:
    def counted(real: Any) -> Any:
        def action(*arguments: Any, **named: Any) -> Any:
            nonlocal step
            if step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            step -= 1
            os.write(log, b".")
            return real(*arguments, **named)

        return action

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    Draft.checkpoint_if_due = Draft.checkpoint  # type: ignore[method-assign]
    JOBS[job](folder, out)


def main() -> None:
    # What the children would otherwise import one after the other, for seconds each.
    import_faiss()
    for name in (
        "retrieval.upgrading.upgrade",
        "scipy.stats",
        "safetensors.numpy",
        "pyarrow.csv",
        "torch._dynamo",
        "torchvision.transforms.v2.functional",
        "PIL.Image",
        "pillow_heif",
    ):
        with contextlib.suppress(ImportError):
            import_module(name)
    sys.modules["PIL.Image"].init()
    for line in sys.stdin:
        job, folder, out, step = line.rstrip("\n").split("\t")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            code = 1
            try:
                work(job, Path(folder), Path(out), int(step), writing)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        print(child, flush=True)
        with os.fdopen(reading, "rb") as log:
            actions = len(log.read())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), actions, flush=True)


main()
