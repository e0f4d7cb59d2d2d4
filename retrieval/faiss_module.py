"""The package behind `import faiss`, whichever distribution it came with."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import re
import sys
from typing import Any

from mmalign.errors import InputError, reason_of

__all__ = ["FAISS_DISTRIBUTIONS", "faiss_reason", "import_faiss"]

FAISS_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_log = logging.getLogger(__name__)


@functools.cache
def import_faiss() -> Any:
    """The module `faiss`, once exactly one distribution provides it.

    Raises:
        InputError: none is installed, or several, which overwrite each other's files.
    """
    present = []
    for name in FAISS_DISTRIBUTIONS:
        try:
            importlib.metadata.version(name)
            present.append(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(present) > 1:
        raise InputError(
            f"{' and '.join(present)} are both installed and overwrite each other; run "
            f"`pip uninstall -y {' '.join(present)}` and then `pip install mmalign[cpu]` or `mmalign[gpu]`"
        )
    if sys.platform == "darwin" and "KMP_DUPLICATE_LIB_OK" not in os.environ:
        # torch and faiss each bring libomp on macOS and abort at the second one. Opt out by setting the variable.
        os.environ.update(KMP_DUPLICATE_LIB_OK="TRUE", OMP_NUM_THREADS="1")
        _log.info("macOS: OMP_NUM_THREADS=1 and KMP_DUPLICATE_LIB_OK=TRUE were set for faiss beside torch")
    try:
        import faiss
    except ImportError:
        raise InputError("FAISS is not installed; run `pip install mmalign[cpu]` (or `mmalign[gpu]`)") from None
    return faiss


def faiss_reason(error: BaseException) -> str:
    """What FAISS says is wrong, without the places in its source that it names first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return reason_of(RuntimeError(re.sub(r"^Error in .*? at \S+:\d+: ", "", lines[-1])), 200)
