"""Speed, recall and memory of indexing and searching, as ratios to the bare parts, in one run on one machine.

    python scripts/bench_retrieval.py indexing     images/s against bare decoding, the bare model and clip-retrieval
    python scripts/bench_retrieval.py search       latency and recall against bare FAISS at 10k, 100k, 1M x 512
    python scripts/bench_retrieval.py upgrade      latency while the encoder is being replaced, against one partition
    python scripts/bench_retrieval.py memory       peak memory of building an index of 1M x 512

The encoder is open_clip's ViT-B-32 with random weights: speed does not depend on what the weights say. Synthetic
vectors are clustered and anisotropic; text-like queries have a shifted mean and more noise (the modality gap).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "tests" / "data" / "photos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    indexing = commands.add_parser("indexing")
    indexing.add_argument("--images", type=int, default=192)
    indexing.add_argument("--megapixels", type=float, default=2.0)
    indexing.add_argument("--dtype", default="auto")
    indexing.add_argument("--clip-retrieval", metavar="EXECUTABLE", help="also time this clip-retrieval")
    searching = commands.add_parser("search")
    searching.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    searching.add_argument("--queries", type=int, default=500)
    upgrading = commands.add_parser("upgrade")
    upgrading.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    upgrading.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.25, 0.5, 0.75, 0.95])
    upgrading.add_argument("--queries", type=int, default=300)
    memory = commands.add_parser("memory")
    memory.add_argument("--rows", type=int, default=1_000_000)
    memory.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    benches = {"indexing": bench_indexing, "search": bench_search, "upgrade": bench_upgrade, "memory": bench_memory}
    benches[arguments.command](arguments)


# -- indexing ----------------------------------------------------------------------------------------------------------


def bench_indexing(arguments: argparse.Namespace) -> None:
    """Whole command, loop, and the two bare loops on the same files."""
    import torch

    from mmalign import load_encoder
    from mmalign.imaging import read_file, read_image
    from mmalign.prefetch import default_workers, prefetch
    from retrieval import ImageIndex

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = make_photos(folder / "photos", arguments.images, arguments.megapixels)
        spec = make_checkpoint(folder / "vit_b_32.safetensors")
        encoder = load_encoder(spec, device="cpu", dtype=arguments.dtype)
        preprocessing = encoder.preprocessing
        assert preprocessing is not None
        size = np.mean([file.stat().st_size for file in files]) / 1e3
        print(
            f"{len(files)} JPEGs of {arguments.megapixels:g} MP, {size:.0f} KB; "
            f"ViT-B-32 {encoder.dtype}, {default_workers()} cores"
        )

        def load(path: Path) -> torch.Tensor:
            return preprocessing(read_image(read_file(path)).pixels)

        def decode() -> None:
            for _ in prefetch(files, load, ahead=96):
                pass

        batch = torch.randn(32, 3, *preprocessing.size)

        def model() -> None:
            for _ in range(max(1, len(files) // 32)):
                encoder.encode_pixels(batch)

        model()
        rates: dict[str, list[float]] = {"decode": [], "model": [], "index": []}
        for turn in range(3):  # interleaved, so that a noisy neighbour disturbs all alike
            rates["decode"].append(len(files) / seconds(decode))
            rates["model"].append(32 * max(1, len(files) // 32) / seconds(model))
            out = folder / f"index-{turn}"
            _, report = ImageIndex.build(folder / "photos", out, encoder=encoder)
            rates["index"].append(report.encoded_per_second)
        decoding, modelling, looping = (float(np.median(values)) for values in rates.values())
        print(f"bare decode loop, same workers    {decoding:7.1f} images/s")
        print(f"bare model loop                   {modelling:7.1f} images/s")
        print(f"index loop                        {looping:7.1f} images/s")
        print(f"  / slower bare loop              {looping / min(decoding, modelling):7.2f}")
        shared = 1 / (1 / decoding + 1 / modelling)
        print(
            f"  / both on the same cores        {looping / shared:7.2f}   (1/(1/decode + 1/model): the bound on a CPU)"
        )
        command = [sys.executable, "-m", "mmalign.cli", "index", str(folder / "photos"), "--out", str(folder / "whole")]
        command += ["--encoder", spec, "--dtype", arguments.dtype, "--device", "cpu", "--quiet"]
        whole = len(files) / seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        print(f"whole `mmalign index` command     {whole:7.1f} images/s")
        if arguments.clip_retrieval:
            rate = len(files) / seconds(lambda: run_clip_retrieval(arguments.clip_retrieval, folder, spec))
            print(f"whole clip-retrieval inference    {rate:7.1f} images/s   ours is {whole / rate:.1f} x")
        else:
            print(
                f"clip-retrieval is not measured here; 2.8 images/s in methods/retrieval-engineering.md B3 "
                f"(one core of another machine): ours is {whole / 2.8:.1f} x that"
            )


def make_photos(folder: Path, count: int, megapixels: float) -> list[Path]:
    """Sample photos scaled to the wanted size, turned and shifted so that no two are equal."""
    from PIL import Image, ImageChops

    folder.mkdir()
    sources = sorted(PHOTOS.glob("*.jpg"))
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    files = []
    for number in range(count):
        picture = Image.open(sources[number % len(sources)]).convert("RGB").resize((height * 4 // 3, height))
        picture = ImageChops.offset(picture, 17 * (number // len(sources)), 0)
        files.append(folder / f"{number:05d}.jpg")
        picture.save(files[-1], quality=92)
    return files


def make_checkpoint(path: Path) -> str:
    """A spec for open_clip's ViT-B-32 with random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return f"open_clip:ViT-B-32/{path}"


def run_clip_retrieval(executable: str, folder: Path, spec: str) -> None:
    """clip-retrieval's own command on the same files and model."""
    out = folder / "clip-retrieval"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
        [executable, "inference", "--input_dataset", str(folder / "photos"), "--output_folder", str(out),
         "--clip_model", spec, "--enable_text", "False", "--num_prepro_workers", "2"],
        check=True, capture_output=True,
    )  # fmt: skip


# -- searching ---------------------------------------------------------------------------------------------------------


def make_world(rows: int, dim: int = 512, seed: int = 0) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """Samplers of clustered unit rows and of text-like queries for them."""
    random = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(1 + np.arange(dim) / 16)).astype(np.float32)
    centres = random.standard_normal((1000, dim), np.float32) * spectrum
    shift = random.standard_normal(dim).astype(np.float32)
    shift *= 0.6 * np.linalg.norm(centres, axis=1).mean() / np.linalg.norm(shift)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def images(count: int, random: np.random.Generator) -> np.ndarray:
        chosen = centres[random.integers(0, len(centres), count)]
        return unit(chosen + 0.7 * random.standard_normal((count, dim), np.float32) * spectrum)

    def texts(count: int, random: np.random.Generator) -> np.ndarray:
        chosen = centres[random.integers(0, len(centres), count)]
        return unit(chosen + 1.0 * random.standard_normal((count, dim), np.float32) * spectrum + shift)

    return images, texts


def write_world(path: Path, rows: int) -> np.ndarray:
    """A .npy of `rows` x 512, written in pieces."""
    images, _ = make_world(rows)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 512))
    random = np.random.default_rng(1)
    for start in range(0, rows, 50_000):
        vectors[start : start + 50_000] = images(min(50_000, rows - start), random)
    vectors.flush()
    return np.load(path, mmap_mode="r")


def bench_search(arguments: argparse.Namespace) -> None:
    """Latency of one query at a time, ours with exact scoring over bare FAISS with the same settings."""
    from retrieval import ImageIndex
    from retrieval.faiss_module import import_faiss

    faiss = import_faiss()
    print("    rows  FAISS type        build s  bare ms  ours ms  ratio  search() ms  R@10 text  R@10 image  bare text")
    for rows in arguments.sizes:
        images, texts = make_world(rows)
        random = np.random.default_rng(2)
        tuning, text, image = (make(arguments.queries, random) for make in (texts, texts, images))
        with tempfile.TemporaryDirectory() as temporary:
            vectors = write_world(Path(temporary) / "vectors.npy", rows)
            start = time.perf_counter()
            index = ImageIndex.from_vectors(vectors, Path(temporary) / "index", text_queries=tuning[:200])
            built = time.perf_counter() - start
            index.search_vectors(text[:1], 10)
            bare_index = index.snapshot.partition.faiss
            faiss.omp_set_num_threads(1)
            bare, ours, whole = [], [], []
            for query in text:  # alternating, so that a noisy neighbour disturbs all alike
                bare.append(seconds(partial(bare_index.search, query[None], 10)))
                ours.append(seconds(partial(index.search_vectors, query[None], 10)))
                whole.append(seconds(partial(index.search, query, 10)))
            faiss.omp_set_num_threads(os.cpu_count() or 1)
            recalls = [
                recall(index.search_vectors(q, 10)[1], index.search_vectors(q, 10, exact=True)[1])
                for q in (text, image)
            ]
            plain = recall(bare_index.search(text, 10)[1], index.search_vectors(text, 10, exact=True)[1])
            a, b, c = (1e3 * float(np.median(values)) for values in (bare, ours, whole))
            kind = index.manifest["faiss"]["factory"]
            columns = [f"{rows:>8,}", f"{kind:<16}", f"{built:>8.1f}", f"{a:>8.3f}", f"{b:>8.3f}", f"{b / a:>6.2f}"]
            columns += [f"{c:>12.3f}", f"{recalls[0]:>10.3f}", f"{recalls[1]:>11.3f}", f"{plain:>10.3f}"]
            print("  ".join(columns), index.manifest["faiss"]["parameters"] or "")


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of the true ten that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))


# -- searching while the encoder is being replaced ---------------------------------------------------------------------


def bench_upgrade(arguments: argparse.Namespace) -> None:
    """From a text-like query's vectors to hits, one at a time, bridge and merging included; and the Procrustes fit."""
    import torch

    from mmalign.score_calibration import ScoreCalibration
    from mmalign.spherical_interpolation import padded_procrustes
    from retrieval import ImageIndex
    from retrieval.draft import Draft
    from retrieval.faiss_module import import_faiss
    from retrieval.query_rows import QueryRows
    from retrieval.recorded_encoder import describe_vectors
    from retrieval.upgrading.bridge import Bridge, KindBridge
    from retrieval.upgrading.checking import prepare
    from retrieval.upgrading.part import UpgradePart, new_entry

    random = np.random.default_rng(4)
    pairs = [torch.from_numpy(random.standard_normal((20_000, 768), np.float32)) for _ in range(2)]
    print(f"Procrustes fit of 20,000 x 768 pairs: {seconds(partial(padded_procrustes, *pairs)):.1f} s")
    print("    rows  FAISS type        one, ms    embedded anew: ms (ratio to one partition)")
    for rows in arguments.sizes:
        _, texts = make_world(rows)
        tuning, queries = texts(200, random), texts(arguments.queries, random)
        rotation = np.linalg.qr(random.standard_normal((512, 512)))[0].astype(np.float32)
        with tempfile.TemporaryDirectory() as temporary:
            vectors = write_world(Path(temporary) / "vectors.npy", rows)
            alone = ImageIndex.from_vectors(vectors, Path(temporary) / "alone", text_queries=tuning)
            shutil.copytree(Path(temporary) / "alone", Path(temporary) / "both")
            both = ImageIndex.open(Path(temporary) / "both")
            order, cells = random.permutation(rows), []
            scale = ScoreCalibration(0.6, 0.1, 0.2, 0.1)
            moved = 0
            for share in arguments.shares:
                with both.store.write() as writer:
                    draft = Draft(writer, both.store.read_manifest())
                    if draft.upgrade is None:
                        draft.upgrade = UpgradePart(writer, new_entry(describe_vectors(512)))
                        bridge = Bridge({"text": KindBridge("slerp", 0.5, rotation.T.copy(), None, scale, scale)}, {})
                        draft.upgrade.about |= {"stage": "running", "modes": {"text": "merged"}}
                        draft.upgrade.about["bridge"] = bridge.write(writer)
                    chosen = np.sort(order[moved : round(share * rows)])
                    moved = round(share * rows)
                    for part in np.array_split(chosen, max(1, len(chosen) // 50_000)):
                        draft.upgrade.take(part, vectors[part] @ rotation)
                    prepare(draft, draft.upgrade)
                    draft.checkpoint()
                both.refresh()
                live, one = both.snapshot, alone.snapshot
                faiss = import_faiss()
                faiss.omp_set_num_threads(1)
                asked = [QueryRows("text", q[None], q[None] @ rotation) for q in queries]
                plain = [QueryRows("text", q[None]) for q in queries]
                live.search(asked[0], 10)
                one.search(plain[0], 10)
                times: list[list[float]] = [[], []]
                for a, b in zip(plain, asked, strict=True):  # alternating, so that a neighbour disturbs both alike
                    times[0].append(seconds(partial(one.search, a, 10)))
                    times[1].append(seconds(partial(live.search, b, 10)))
                faiss.omp_set_num_threads(os.cpu_count() or 1)
                single, double = (1e3 * float(np.median(values)) for values in times)
                cells.append(f"{share:.0%}: {double:.3f} ({double / single:.2f})")
            kind = alone.manifest["faiss"]["factory"]
            print(f"{rows:>8,}  {kind:<16}  {single:>7.3f}    " + "  ".join(cells), flush=True)


# -- memory ------------------------------------------------------------------------------------------------------------


def bench_memory(arguments: argparse.Namespace) -> None:
    """Peak resident memory of a process that builds an index from vectors on disk."""
    if arguments.inside:
        from retrieval import ImageIndex

        before = peak_kilobytes()
        vectors = np.load(arguments.inside / "vectors.npy", mmap_mode="r")
        start = time.perf_counter()
        index = ImageIndex.from_vectors(vectors, arguments.inside / "index")
        built = time.perf_counter() - start
        peak = peak_kilobytes()
        raw = vectors.nbytes / 1024
        kind = index.manifest["faiss"]["factory"]
        print(
            f"{len(vectors):,} x 512, {kind}: built in {built:.0f} s, raw vectors {raw / 1e6:.2f} GB, peak "
            f"{peak / 1e6:.2f} GB ({before / 1e6:.2f} GB of it imports) = {peak / raw:.2f} x raw"
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_world(Path(temporary) / "vectors.npy", arguments.rows)
        subprocess.run([sys.executable, __file__, "memory", "--inside", temporary], check=True)


def peak_kilobytes() -> int:
    """Most memory this process ever had resident, mapped files included. (getrusage carries over from the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
