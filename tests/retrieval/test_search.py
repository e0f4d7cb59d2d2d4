"""What a search gives, against brute force, algebra by hand and simulation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from drawing import clustered, draw, names, unit
from PIL import Image
from tiny_encoder import DIM, TinyEncoder, expected_vector

from mmalign.errors import InputError, UnreadableImageError
from retrieval import ImageIndex, Term
from retrieval.calibration import Calibration, background_rows, best_by_chance, query_bank
from retrieval.query import parse_term

TESTS = Path(__file__).parent


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 9, 700])
@pytest.mark.parametrize("exact", [False, True])
def test_small_indexes_equal_brute_force(tmp_path: Path, rows: int, exact: bool) -> None:
    vectors = clustered(rows, 48)
    index = ImageIndex.from_vectors(vectors, tmp_path / "idx")
    queries = clustered(30, 48, seed=1)
    truth = queries @ vectors.T
    for k in (1, 5, rows, rows + 7):
        for batch in (queries, queries[:1]):
            scores, found = index.search_vectors(batch, k, exact=exact)
            assert scores.shape == found.shape == (len(batch), k)
            for number in range(len(batch)):
                order = np.lexsort((np.arange(rows), -truth[number]))[:k]
                np.testing.assert_array_equal(found[number, : len(order)], order)
                np.testing.assert_allclose(scores[number, : len(order)], truth[number][order], atol=1e-6)
                assert (found[number, len(order) :] == -1).all()
                assert (scores[number, len(order) :] == -np.inf).all()


def test_the_choice_for_small_indexes_loses_nothing_to_half_precision(tmp_path: Path) -> None:
    """Rows so close together that half precision confuses their order: exact scoring puts it right."""
    random = np.random.default_rng(0)
    centre = unit(random.standard_normal(DIM))
    vectors = unit(centre + 2e-2 * random.standard_normal((500, DIM)))
    index = ImageIndex.from_vectors(vectors, tmp_path / "idx")
    assert index.manifest["faiss"]["factory"] == "SQfp16"
    order = np.argsort(-(vectors @ centre))[:10]
    assert (index.snapshot.partition.faiss.search(centre[None], 10)[1][0] != order).any(), "else this tests nothing"
    scores, found = index.search_vectors(centre[None], 10)
    np.testing.assert_array_equal(found[0], order)
    np.testing.assert_allclose(scores[0], (vectors @ centre)[order], atol=1e-7)


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_one(index: ImageIndex, k: int) -> None:
    for use in (
        lambda: index.search("x", k=k),
        lambda: index.similar(0, k=k),
        lambda: index.search_vectors(np.eye(DIM)[:1], k),
    ):
        with pytest.raises(InputError, match=f"k is {k}"):
            use()


def test_k_above_the_number_of_images(index: ImageIndex) -> None:
    hits = index.search("x", k=1000)
    assert len(hits) == 12
    assert [hit.rank for hit in hits] == list(range(1, 13))
    assert sorted((hit.score for hit in hits), reverse=True) == [hit.score for hit in hits]


def test_scores_are_cosines(index: ImageIndex, folder: Path) -> None:
    query = TinyEncoder().encode_texts(["red bicycle"])[0]
    for hit in index.search("red bicycle", k=12):
        assert hit.score == pytest.approx(float(expected_vector(hit.path) @ query), abs=1e-5)
        assert -1 <= hit.score <= 1


# -- approximate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory", ["IVF128,SQ8", "HNSW16", "PQ16x4fs", "RaBitQfs", "IVF64,RaBitQfs", "PQ16x4fs,RFlat"]
)
def test_approximate_types_keep_the_recall_they_promise(tmp_path: Path, factory: str) -> None:
    dim, rows = 32, 6000
    vectors = clustered(rows, dim)
    index = ImageIndex.from_vectors(vectors, tmp_path / "idx", factory=factory)
    assert index.manifest["faiss"]["factory"] == factory
    measured = index.manifest["measured"]
    low, high = measured["interval95"]
    assert low <= measured["recall@10"] <= high
    assert measured["recall@10"] >= 0.95
    # Fresh queries of the same kind as those it was tuned on: stored rows with noise of half their norm.
    random = np.random.default_rng(5)
    queries = unit(vectors[random.choice(rows, 400)] + 0.5 * random.standard_normal((400, dim)) / np.sqrt(dim))
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    reopened = ImageIndex.open(tmp_path / "idx")
    scores, found = reopened.search_vectors(queries, 10)
    hits = np.array([len(np.intersect1d(a, b)) / 10 for a, b in zip(truth, found, strict=True)])
    half = 3 * math.hypot((high - low) / 3.92, float(hits.std()) / math.sqrt(len(hits)))
    assert hits.mean() >= measured["recall@10"] - half - 0.005
    for number in range(0, 400, 40):
        np.testing.assert_allclose(scores[number], vectors[found[number]] @ queries[number], atol=1e-6)
    one_by_one = np.concatenate([reopened.search_vectors(query[None], 10)[1] for query in queries[:40]])
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(truth, one_by_one, strict=False)]) > 0.9
    assert len(reopened.search_vectors(queries[:2], 3000)[1][0]) == 3000
    assert (reopened.search_vectors(queries[:2], 7000)[1] >= 0).sum() == 2 * rows, "more than FAISS reaches are scanned"


def test_tuning_reaches_what_is_asked_for(tmp_path: Path) -> None:
    vectors = clustered(8000, 32, noise=2.0)
    parameters = {}
    for wanted in (0.5, 0.99):
        index = ImageIndex.from_vectors(vectors, tmp_path / str(wanted), factory="IVF256,Flat", recall=wanted)
        assert index.manifest["measured"]["recall@10"] >= wanted
        parameters[wanted] = index.manifest["faiss"]["parameters"]["nprobe"]
    assert parameters[0.5] < parameters[0.99]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Nonsense", "does not understand"),
        ("IVF100000,Flat", "100000 lists for 100"),
        ("PQ7", "does not understand|cannot make"),
        ("PQ16", "cannot make"),
    ],
)
def test_factory_errors(tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageIndex.from_vectors(clustered(100, 32), tmp_path / "idx", factory=factory)
    assert not (tmp_path / "idx").exists()


def test_factory_is_judged_at_the_width_of_the_vectors(tmp_path: Path) -> None:
    index = ImageIndex.from_vectors(clustered(400, 24), tmp_path / "idx", factory="PQ12x4fs")
    assert len(index.search(clustered(1, 24)[0], k=5)) == 5


# -- duplicates and neighbours -----------------------------------------------------------------------------------------


def test_duplicates(folder: Path, encoder: TinyEncoder) -> None:
    draw(folder / "copies" / "03 again.png", 3)
    draw(folder / "copies" / "03 too.png", 3)
    with Image.open(folder / "05.png") as image:
        image.save(folder / "05.bmp")  # the same picture, another file
    index, _ = ImageIndex.build(folder, encoder=encoder)
    same = [{item.name for item in group} for group in index.duplicates()]
    assert same == [{"03.png", "copies/03 again.png", "copies/03 too.png"}]
    near = [{item.name for item in group} for group in index.duplicates(0.999)]
    assert near == [*same, {"05.png", "05.bmp"}]
    assert len(index.duplicates(-1, neighbours=20)) == 1, "everything is like everything"
    for wrong in (1.5, -2, float("nan")):
        with pytest.raises(InputError, match="near is"):
            index.duplicates(wrong)


def test_similar_leaves_itself_out(index: ImageIndex, folder: Path, tmp_path: Path) -> None:
    draw(folder / "copy.png", 3)
    index.update()
    vectors = {item.name: expected_vector(item.path) for item in index}
    expected = sorted(vectors, key=lambda name: -float(vectors[name] @ vectors["03.png"]))
    expected = [name for name in expected if name not in ("03.png", "copy.png")]
    number = next(item.id for item in index if item.name == "03.png")
    for image in (number, folder / "03.png", os.fspath(folder / "03.png"), folder / "copy.png"):
        hits = index.similar(image, k=4)
        assert names(hits) == expected[:4]
        assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert len(index.similar(number, k=50)) == 11
    other = draw(tmp_path / "other.png", 3)
    assert names(index.similar(other, k=1)) == ["03.png"], "a file that is not of the index leaves nothing out"
    with pytest.raises(InputError, match="no item with id 999"):
        index.similar(999)
    with pytest.raises(UnreadableImageError):
        index.similar(tmp_path / "nowhere.png")


# -- queries -----------------------------------------------------------------------------------------------------------


def test_composite_queries_equal_the_sum_by_hand(index: ImageIndex, folder: Path) -> None:
    encoder = TinyEncoder()
    red, snow = encoder.encode_texts(["red", "snow"]).astype(np.float64)
    image = expected_vector(folder / "04.png").astype(np.float64)
    vectors = {item.name: expected_vector(item.path) for item in index}
    cases = [
        ("red", red),
        (["red", "snow"], red + snow),
        ([Term("red", 2), Term("snow", -0.5)], 2 * red - 0.5 * snow),
        (["red", folder / "04.png"], red + image),
        ([Term(folder / "04.png", 0.3, "image"), Term("snow", -1)], 0.3 * image - snow),
        (Term("red", -1), -red),
        ([Image.open(folder / "04.png")], image),
        (3.0 * image.astype(np.float32), image),
        (image.astype(np.float32)[None], image),
    ]
    for query, total in cases:
        wanted = total / np.linalg.norm(total)
        hits = index.search(query, k=12)
        assert [hit.score for hit in hits] == pytest.approx(
            sorted((float(v @ wanted) for v in vectors.values()), reverse=True), abs=1e-5
        )
        assert hits[0].score == pytest.approx(float(vectors[hits[0].item.name] @ wanted), abs=1e-5)


def test_queries_that_cannot_be(index: ImageIndex, folder: Path) -> None:
    nan = np.full(DIM, np.nan, np.float32)
    for query, message in [
        (nan, "not finite"),
        (np.zeros(DIM, np.float32), "zero"),
        (np.ones(DIM + 1, np.float32), "17 columns"),
        ("", "empty"),
        ("  ", "empty"),
        ([], "empty"),
        (["red", Term("red", -1)], "cancel out"),
        ([1.0, 2.0], "image must be"),
        (None, "image must be"),
    ]:
        with pytest.raises(InputError, match=message):
            index.search(query)
    for weight in (0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="weight"):
            Term("red", weight)
    with pytest.raises(InputError, match="kind is"):
        Term("red", 1, "sound")
    with pytest.raises(InputError, match=r"shape \(2, 3\)"):
        index.search_vectors(np.ones((2, 3), np.float32))
    with pytest.raises(UnreadableImageError, match="nowhere"):
        index.search(folder / "nowhere.png")


def test_parse_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "cat", "2:30 pm"):
        Path(name).touch()
    Path("folder").mkdir()

    def term(text: str, sign: float = 1.0) -> tuple[object, float, str]:
        parsed = parse_term(text, sign)
        return (os.fspath(parsed.value), parsed.weight, parsed.kind)

    assert term("red bicycle") == ("red bicycle", 1, "text")
    assert term("cat.jpg") == ("cat.jpg", 1, "image")
    assert term("cat") == ("cat", 1, "image"), "what names a file is an image"
    assert term("2:30 pm") == ("2:30 pm", 1, "image"), "even if it looks like a weight"
    assert term("2:31 pm") == ("31 pm", 2, "text")
    assert term("text:cat") == ("cat", 1, "text")
    assert term("image:cat") == ("cat", 1, "image")
    assert term("image:nowhere.jpg") == ("nowhere.jpg", 1, "image")
    assert term("2:red") == ("red", 2, "text")
    assert term("-0.5:red") == ("red", -0.5, "text")
    assert term("+.5:red", -1) == ("red", -0.5, "text")
    assert term("0.5:cat.jpg") == ("cat.jpg", 0.5, "image")
    assert term("2:text:cat") == ("cat", 2, "text")
    assert term("text:2:30 pm") == ("2:30 pm", 1, "text")
    assert term("red", -1) == ("red", -1, "text")
    assert term("folder") == ("folder", 1, "text")
    assert term("2:") == ("2:", 1, "text")
    assert term("3e2:red") == ("3e2:red", 1, "text")
    long = "a very long query " * 500
    assert term(long) == (long, 1, "text")
    assert term("nul \0 in it") == ("nul \0 in it", 1, "text")
    assert term("line\nbreak") == ("line\nbreak", 1, "text")
    assert term("text:nowhere/cat.jpg") == ("nowhere/cat.jpg", 1, "text")
    for missing in ("nowhere/cat.jpg", "beach.jpg", "2:beach.JPG", "trip/beach"):
        with pytest.raises(InputError, match=r"does not exist; (2:)?text:"):
            parse_term(missing)
    for wrong in ("", " ", "text:", "0:red", "2: ", "text: "):
        with pytest.raises(InputError):
            parse_term(wrong)


def test_a_term_may_name_a_file_of_the_indexed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos/trip").mkdir(parents=True)
    (tmp_path / "photos/trip/a.jpg").touch()
    (tmp_path / "photos/word").touch()
    monkeypatch.chdir(tmp_path)
    roots = [tmp_path / "elsewhere", tmp_path / "photos"]
    for text, weight in (("trip/a.jpg", 1), ("2:trip/a.jpg", 2), ("image:trip/a.jpg", 1)):
        term = parse_term(text, roots=roots)
        assert (term.value, term.weight, term.kind) == (tmp_path / "photos/trip/a.jpg", weight, "image")
    assert parse_term("word", roots=roots).kind == "text", "a bare word is not looked for there"


# -- matches -----------------------------------------------------------------------------------------------------------


def test_min_match_gives_nothing_for_nonsense(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cone = unit(random.standard_normal(64))
    images = unit(2 * cone + random.standard_normal((3000, 64)) / 8)
    index = ImageIndex.from_vectors(images, tmp_path / "idx")
    elsewhere = unit(random.standard_normal((100, 64)))
    assert all(index.search(query, min_match=0.5) == [] for query in elsewhere)
    assert all(len(index.search(query)) == 10 for query in elsewhere)
    close = unit(images[:100] + 0.1 * random.standard_normal((100, 64)) / 8)
    assert all(index.search(query, min_match=0.95)[0].item.id == number for number, query in enumerate(close))


def test_match_of_chance_hits_is_spread_evenly(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    index = ImageIndex.from_vectors(unit(random.standard_normal((3000, 64))), tmp_path / "idx")
    match = np.array([index.search(query, k=1)[0].match for query in unit(random.standard_normal((300, 64)))])
    assert 0.3 < match.mean() < 0.7
    assert 0.25 < (match > 0.5).mean() < 0.75


def test_min_score_and_min_match_cut_the_list(index: ImageIndex) -> None:
    hits = index.search("x", k=12)
    assert all(hit.match is not None and 0 <= hit.match <= 1 for hit in hits)
    level = (hits[3].score + hits[4].score) / 2
    assert index.search("x", k=12, min_score=level) == hits[:4]
    assert [h for h in hits if h.match >= 0.5] == index.search("x", k=12, min_match=0.5)


def test_few_images_have_no_match(tmp_path: Path) -> None:
    for rows, has in ((7, False), (8, True)):
        index = ImageIndex.from_vectors(clustered(rows, DIM), tmp_path / str(rows))
        assert (index.search(np.ones(DIM))[0].match is not None) == has


@pytest.mark.parametrize(("n", "trials"), [(500, 200), (20_000, 60), (200_000, 6)])
def test_best_by_chance_equals_simulation(n: int, trials: int) -> None:
    """Random directions: the formula from median and quantile against the best of n that were really drawn."""
    random = np.random.default_rng(n)
    dim = 128
    queries = unit(random.standard_normal((50, dim)))
    predicted = best_by_chance(queries, unit(random.standard_normal((2048, dim))), n)
    assert (np.diff(predicted) >= 0).all()

    def best() -> float:  # the cosine of a fixed with a random direction is g / sqrt(g^2 + chi2 with dim - 1)
        normal, rest = random.standard_normal(n), random.chisquare(dim - 1, n)
        return float((normal / np.sqrt(normal**2 + rest)).max())

    assert predicted.mean() == pytest.approx(np.mean([best() for _ in range(trials)]), rel=0.07)


def test_leave_one_out_is_not_moved_by_the_row_itself() -> None:
    rows = clustered(400, 32, clusters=400)
    whole = best_by_chance(rows, rows, 400, leave_one_out=True)
    by_hand = []
    for number in range(400):
        others = np.delete(rows @ rows[number], number)
        middle, upper = np.quantile(others, [0.5, 0.98])
        from scipy.stats import norm

        by_hand.append(middle + (upper - middle) / norm.ppf(0.98) * norm.ppf(1 - 1 / 401))
    np.testing.assert_allclose(whole, np.sort(by_hand), atol=1e-5)


def test_match_is_a_share_of_references() -> None:
    calibration = Calibration(np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.array([0.5], np.float32))
    np.testing.assert_array_equal(calibration.match(np.array([0.0, 0.15, 0.35, 0.9]), "text"), [0, 0.25, 0.75, 1])
    np.testing.assert_array_equal(calibration.match(np.array([0.45, 0.55]), "image"), [0, 1])
    only_images = Calibration(np.zeros(0, np.float32), np.array([0.5], np.float32))
    assert only_images.match(np.array([0.45, 0.55]), "text") is None, "image levels say nothing about texts"
    assert Calibration.from_dict(None) is None
    many = Calibration(np.linspace(0, 1, 5000, dtype=np.float32), np.linspace(0, 1, 10, dtype=np.float32))
    again = Calibration.from_dict(many.to_dict())
    assert again is not None
    probe = np.linspace(0, 1, 999)
    np.testing.assert_allclose(again.match(probe, "text"), many.match(probe, "text"), atol=0.006)
    assert len(query_bank(100)) < len(query_bank(100_000)) == len(set(query_bank(100_000)))


def test_background_is_spread_over_the_living() -> None:
    alive = np.zeros(100_000, bool)
    alive[50_000:] = True
    rows = background_rows(alive)
    assert (len(rows), rows[0], rows[-1]) == (2048, 50_000, 99_999)
    assert len(set(rows)) == 2048
    assert len(background_rows(alive[:50_010])) == 10


# -- threads and processes ---------------------------------------------------------------------------------------------


def test_eight_threads_find_what_one_finds(tmp_path: Path) -> None:
    vectors = clustered(5000, 32)
    ImageIndex.from_vectors(vectors, tmp_path / "idx", factory="IVF32,SQ8")
    queries = clustered(48, 32, seed=3)
    serial = ImageIndex.open(tmp_path / "idx")
    expected = [[(hit.item.id, hit.score) for hit in serial.search(query, where="id % 2 = 0")] for query in queries]
    fresh = ImageIndex.open(tmp_path / "idx")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: [(h.item.id, h.score) for h in fresh.search(q, where="id % 2 = 0")], queries))
        batches = list(pool.map(lambda part: fresh.search_vectors(part, 10)[1], np.split(queries, 8)))
    assert found == expected
    np.testing.assert_array_equal(np.concatenate(batches), serial.search_vectors(queries, 10)[1])


def test_fork_after_search_does_not_hang(tmp_path: Path) -> None:
    """Servers with several workers fork after the index has been used, single queries being asked on one thread."""
    rows = tmp_path / "rows.npy"
    np.save(rows, clustered(3000, 32))
    script = f"""
import os, sys
sys.path.insert(0, {os.fspath(TESTS)!r})
import numpy as np
from retrieval import ImageIndex
rows = np.load({os.fspath(rows)!r})
ImageIndex.from_vectors(rows, {os.fspath(tmp_path / "idx")!r}, factory="IVF16,SQ8")
index = ImageIndex.open({os.fspath(tmp_path / "idx")!r})
before = [hit.item.id for hit in index.search(rows[5], where="id < 2000")]
child = os.fork()
if child == 0:
    after = [hit.item.id for hit in index.search(rows[5], where="id < 2000")]
    os._exit(0 if after == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=TESTS.parents[1], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
