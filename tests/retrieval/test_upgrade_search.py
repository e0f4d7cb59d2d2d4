"""The mathematics of an upgrade against hand loops: bridges, merged rankings, the report, selectors of FAISS."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from colour_encoder import ColourEncoder, paint_folder
from drawing import unit
from scipy.linalg import orthogonal_procrustes
from scipy.stats import norm

from mmalign.score_calibration import ScoreCalibration
from retrieval import ImageIndex, IndexUpgrade
from retrieval.query_rows import QueryRows
from retrieval.upgrading.bridge import Bridge, KindBridge
from retrieval.upgrading.live import LiveUpgrade
from retrieval.upgrading.measuring import Gallery, Task, choose_mode, forward_map, mean_and_half, measure_kinds
from retrieval.upgrading.support import altered_copy


def log_ratio(scores: np.ndarray, one: ScoreCalibration) -> np.ndarray:
    matched = norm.logpdf(scores, one.matched_mean, one.matched_std)
    return np.asarray(matched - norm.logpdf(scores, one.background_mean, one.background_std))


# -- bridges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old_dim", "new_dim"), [(8, 12), (12, 8), (8, 8)])
def test_bridged_queries_by_hand(old_dim: int, new_dim: int) -> None:
    random = np.random.default_rng(0)
    old, new = (unit(random.standard_normal((5, dim))) for dim in (old_dim, new_dim))
    wide = max(old_dim, new_dim)
    matrix = np.linalg.qr(random.standard_normal((wide, wide)))[0][:new_dim].astype(np.float32)
    offset = random.standard_normal(wide).astype(np.float32)
    for alpha in (0.0, 0.3, 1.0):
        found = KindBridge("slerp", alpha, matrix).queries(old, new, old_dim)
        for row, a, b in zip(found, old, new, strict=True):
            u, v = np.pad(a, (0, wide - old_dim)).astype(np.float64), (b @ matrix).astype(np.float64)
            theta = np.arccos(u @ v)
            point = (np.sin((1 - alpha) * theta) * u + np.sin(alpha * theta) * v) / np.sin(theta)
            np.testing.assert_allclose(row, unit(point[:old_dim]), atol=1e-5)
    affine = KindBridge("lambda", 1.0, matrix, offset).queries(None, new, old_dim)
    np.testing.assert_allclose(affine, unit((new @ matrix + offset)[:, :old_dim]), atol=1e-5)
    assert KindBridge("old", 0.0).queries(old, None, old_dim) is old


def test_a_bridge_is_what_was_written(tmp_path: Path) -> None:
    import retrieval.storage as storage
    from retrieval.upgrading.bridge import SupportQueries

    random = np.random.default_rng(0)
    scale = ScoreCalibration(0.5, 0.1, 0.1, 0.05)
    levels = np.array([0.1, 0.2], np.float32)
    kinds = {
        "text": KindBridge("slerp", 0.4, random.random((3, 4), np.float32), None, scale, scale, levels),
        "image": KindBridge("lambda", 1.0, random.random((3, 4), np.float32), random.random(4, np.float32)),
    }
    answers = [(7, "ab" * 32), (9, "01" * 32)]
    rows = random.random((2, 4), np.float32), random.random((2, 3), np.float32), answers
    support = {"text": SupportQueries(*rows), "image": SupportQueries(None, *rows[1:])}
    held = dict(zip(answers, random.random((2, 3), np.float32), strict=True))
    with storage.Store(tmp_path / "idx").create() as writer:
        about = Bridge(kinds, support, held).write(writer)
        again = Bridge.read(tmp_path / "idx", about)
    for kind, one in kinds.items():
        for name in ("how", "alpha", "bridged", "renewed"):
            assert getattr(again.kinds[kind], name) == getattr(one, name)
        for name in ("matrix", "offset", "levels"):
            np.testing.assert_array_equal(getattr(again.kinds[kind], name), getattr(one, name))
        for name in ("old", "new"):
            np.testing.assert_array_equal(getattr(again.support[kind], name), getattr(support[kind], name))
        assert again.support[kind].answers == answers
    assert list(again.held) == answers
    np.testing.assert_array_equal(list(again.held.values()), list(held.values()))


def test_the_middle_of_a_picture_mirrored() -> None:
    import torch

    pixels = torch.arange(100, dtype=torch.uint8).reshape(1, 10, 10).expand(3, -1, -1)
    expected = np.arange(100).reshape(10, 10)[2:8, 2:8][:, ::-1]
    np.testing.assert_array_equal(altered_copy(pixels)[1], expected)
    assert altered_copy(pixels[:, :1, :1]).shape == (3, 1, 1)


# -- merged rankings ---------------------------------------------------------------------------------------------------

FACTORIES = ["auto", "Flat", "SQ8", "HNSW16", "IVF4,Flat", "IVF4,SQ8", "IVF4,RaBitQfs", "PQ8x4fs", "PCA12,IVF4,Flat"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 colours, 40 of them embedded anew."""
    where = tmp_path_factory.mktemp("running")
    captions = paint_folder(where / "photos", 160)
    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    ImageIndex.build(where / "photos", encoder=weak)
    upgrade = IndexUpgrade(where / "photos", strong, encoder=weak)
    upgrade.measure(captions, sample=60)
    upgrade.start(force=True)  # 15 queries are too few to be clear
    upgrade.backfill(limit=10)
    return where / "photos"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factory", FACTORIES)
def test_every_index_type_gives_the_merged_ranking(
    running: Path, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrieval import row_search

    for name in ("_SCAN_ROWS", "_SCAN_SHARE"):  # so few rows would be scanned, whatever the type
        monkeypatch.setattr(row_search, name, 0)
    shutil.copytree(running, tmp_path / "photos")
    index = ImageIndex.open(tmp_path / "photos")
    index.remove([3, 50, 51, 52])
    index.rebuild(factory=factory, recall=1.0)
    assert len(index.search("200 40 7", k=200)) == 156
    upgrade = IndexUpgrade(tmp_path / "photos")
    upgrade.backfill(limit=3)  # the new partition is made of the same type from here on
    index.refresh()
    live = index.snapshot.upgrade
    assert live is not None
    if factory != "auto":
        assert index.manifest["faiss"]["factory"] == live.about["faiss"]["factory"] == factory
    texts = [f"{n} {255 - n} {(7 * n) % 256}" for n in range(0, 250, 23)]
    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    query = QueryRows("text", weak.encode_texts(texts), strong.encode_texts(texts))
    for k in (1, 10, 200)["PCA" in factory :]:  # of half the dimensions, the best need not be among the first four
        found = live.find(query, k, mode="merged")
        exact = live.find(query, k, mode="merged", exact=True)
        np.testing.assert_array_equal(found.rows, exact.rows)
        np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5)


def test_merged_ranking_by_hand(running: Path) -> None:
    index = ImageIndex.open(running)
    live = index.snapshot.upgrade
    assert live is not None
    texts = [f"{n} {255 - n} {(7 * n) % 256}" for n in range(0, 250, 23)]
    weak, strong = ColourEncoder("weak").encode_texts(texts), ColourEncoder("strong").encode_texts(texts)
    one = live.bridge.kinds["text"]
    assert one.bridged is not None
    assert one.renewed is not None
    bridged = one.queries(weak, strong, 16)
    old = index.vectors.gather(np.arange(160))
    place_of = {int(row): place for place, row in enumerate(live.places)}
    assert len(place_of) == 40
    even = np.array([item.row % 2 == 0 for item in sorted(index, key=lambda item: item.row)])
    for mask in (None, even):
        found = live.find(QueryRows("text", weak, strong), 12, mask=mask, mode="merged")
        for number in range(len(texts)):
            keys = []
            for row in np.flatnonzero(even) if mask is not None else range(160):
                if row in place_of:
                    new = live.partition.vectors.gather(np.array([place_of[row]]))[0]
                    scale, score = one.renewed, float(strong[number] @ new)
                else:
                    scale, score = one.bridged, float(bridged[number] @ old[row])
                keys.append((-float(scale.log_likelihood_ratio(np.array(score))), row, score, row in place_of))
            wanted = sorted(keys)[:12]
            assert found.rows[number].tolist() == [row for _, row, _, _ in wanted]
            np.testing.assert_allclose(found.scores[number], [score for _, _, score, _ in wanted], atol=1e-5)
            assert found.by_new is not None
            assert found.by_new[number].tolist() == [new for *_, new in wanted]
    # And the common scale is what it says, where Gaussians can be trusted.
    middle = (one.bridged.matched_mean + one.bridged.background_mean) / 2
    ours = one.bridged.log_likelihood_ratio(np.array([middle]))
    np.testing.assert_allclose(ours, log_ratio(np.array([middle]), one.bridged), rtol=1e-9)


def test_modes(running: Path) -> None:
    index = ImageIndex.open(running)
    live = index.snapshot.upgrade
    assert isinstance(live, LiveUpgrade)
    weak, strong = (ColourEncoder(name).encode_texts(["200 40 7"]) for name in ("weak", "strong"))
    old = index.vectors.gather(np.arange(160))
    query = QueryRows("text", weak, strong)
    assert live.find(query, 160, mode="old").rows[0].tolist() == np.argsort(-(old @ weak[0]), kind="stable").tolist()
    bridged = live.bridge.kinds["text"].queries(weak, strong, 16)
    assert live.find(query, 9, mode="bridged").rows[0].tolist() == np.argsort(-(old @ bridged[0]))[:9].tolist()


@pytest.mark.parametrize(
    ("figures", "mode"),
    [
        ({"old": (0.5, 0.9)}, "old"),
        ({"old": (0.5, 0.9), "bridged": (0.6, 0.8), "merged": (0.4, 1.0)}, "old"),
        ({"old": (0.5, 0.9), "bridged": (0.6, 0.9), "merged": (0.5, 0.95)}, "bridged"),
        ({"old": (0.5, 0.9), "bridged": (0.5, 0.9), "merged": (0.5, 0.9)}, "merged"),
        ({"merged": (0.1, 0.2)}, "merged"),
    ],
)
def test_the_mode_loses_at_no_depth(figures: dict[str, tuple[float, float]], mode: str) -> None:
    assert choose_mode(figures) == mode


# -- the report --------------------------------------------------------------------------------------------------------


def world(rows: int = 90, queries: int = 60) -> tuple[Gallery, Task, np.ndarray]:
    """Gallery and text-like queries of a noisy old model and a better new one of equal width."""
    random = np.random.default_rng(3)
    truth = random.standard_normal((rows, 10))
    rotation = np.linalg.qr(random.standard_normal((10, 10)))[0]
    target = random.integers(0, rows, queries)
    old, new = unit(truth + 0.7 * random.standard_normal((rows, 10))), unit(truth @ rotation)
    asked = truth[target]
    task = Task(
        "text",
        "made up",
        unit(asked + 0.7 * random.standard_normal(asked.shape)),
        unit(asked @ rotation + 0.3 * random.standard_normal(asked.shape)),
        target,
        np.arange(queries) % 3,
    )
    return Gallery(old, new, random.permutation(rows)), task, rotation


def hits(queries: np.ndarray, gallery: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    found = [t in np.argsort(-(gallery @ q), kind="stable")[:k] for q, t in zip(queries, target, strict=True)]
    return np.array(found)


def test_report_by_hand() -> None:
    gallery, task, _ = world()
    pairs = (gallery.old, gallery.new)
    reports, chosen, notes = measure_kinds(gallery, {"text": task}, {"images": pairs})
    report = reports["text"]
    last = task.part == 2
    assert task.old is not None
    rotation, _ = orthogonal_procrustes(gallery.new.astype(np.float64), gallery.old.astype(np.float64))
    ways = {
        "old/old": (task.old, gallery.old),
        "new/new": (task.new, gallery.new),
        "procrustes": (task.new @ rotation, gallery.old),
    }
    base = hits(task.old[last], gallery.old, task.target[last], 1)
    for name, (queries, answers) in ways.items():
        for k in (1, 5, 10):
            expected = hits(queries[last], answers, task.target[last], k)
            assert report.figures[name][f"hit@{k}"] == pytest.approx(expected.mean()), (name, k)
            if k == 1 and name != "old/old":
                assert report.flips[name]["positive"] == pytest.approx((expected & ~base).mean())
                assert report.flips[name]["negative"] == pytest.approx((~expected & base).mean())
                assert report.compatible[name] == (expected.mean() > base.mean())
    gain = hits(task.new[last], gallery.new, task.target[last], 1).astype(float) - base
    assert report.gain[0] == pytest.approx(gain.mean())
    assert report.curve["hit@1"][-1] == report.figures["new/new"]["hit@1"]
    assert any("fewer than 5 pairs a dimension" in note for note in notes) == (len(pairs[0]) < 50)
    one = chosen["text"]
    assert one.bridged is not None
    choosing = task.part == 1
    matched = np.einsum("qd,qd->q", task.new[choosing], gallery.new[task.target[choosing]])
    assert one.renewed is not None
    assert one.renewed.matched_mean == pytest.approx(matched.mean(), abs=1e-5)


def test_intervals_count_images() -> None:
    random = np.random.default_rng(0)
    single = random.random(40)
    mean, half = mean_and_half(single, np.arange(40))
    assert (mean, half) == pytest.approx((single.mean(), 1.96 * single.std(ddof=1) / 40**0.5))
    repeated = mean_and_half(np.repeat(single, 10), np.repeat(np.arange(40), 10))
    assert repeated == pytest.approx((mean, half)), "ten captions that agree are no ten images"
    assert mean_and_half(np.ones(6), np.array([1, 1, 2, 2, 3, 3])) == (1.0, 1.0), "and three prove little"


def test_curve_by_hand() -> None:
    """With the mode that the report names for each share, all else by loops."""
    gallery, task, _ = world()
    reports, chosen, _ = measure_kinds(gallery, {"text": task}, {"images": (gallery.old, gallery.new)})
    curve, one = reports["text"].curve, chosen["text"]
    last = task.part == 2
    assert task.old is not None
    assert one.bridged is not None
    assert one.renewed is not None
    bridged = one.queries(task.old[last], task.new[last], 10)
    for share, first, mode in zip(curve["share"], curve["hit@1"], curve["mode"], strict=True):
        moved = set(gallery.order[: round(share * 90)].tolist())
        found = []
        for query_old, query, query_new, target in zip(
            task.old[last], bridged, task.new[last], task.target[last], strict=True
        ):
            if mode == "merged":
                keys = [
                    float(one.renewed.log_likelihood_ratio(query_new @ gallery.new[row]))
                    if row in moved
                    else float(one.bridged.log_likelihood_ratio(query @ gallery.old[row]))
                    for row in range(90)
                ]
            else:
                keys = list(gallery.old @ (query if mode == "bridged" else query_old))
            found.append(int(np.argmax(keys)) == target)
        assert first == pytest.approx(np.mean(found)), (share, mode)
    assert "merged" in curve["mode"]


def test_forward_map_is_ridge() -> None:
    gallery, _, _ = world()
    x, y = gallery.old.astype(np.float64), gallery.new.astype(np.float64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    weights = np.linalg.solve(xc.T @ xc + 0.1 * (xc**2).sum() / 10 * np.eye(10), xc.T @ yc)
    expected = unit(xc @ weights + y.mean(0))
    np.testing.assert_allclose(forward_map(gallery.old, gallery.new)(gallery.old), expected, atol=1e-5)
