"""An index that changes its encoder: every stage searched, continued, undone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from colour_encoder import ColourEncoder, colour_of, paint
from drawing import names, same_content
from upgrade_world import HELD, IMAGES, SAMPLE, World, own_parts, results

from mmalign.errors import EncoderMismatchError, InputError
from retrieval import ImageIndex, IndexUpgrade, evaluate_captions, read_captions
from retrieval.storage import Store
from retrieval.upgrading.bridge import Bridge
from retrieval.upgrading.report import UpgradeReport

# -- the report --------------------------------------------------------------------------------------------------------


def test_measuring_changes_no_search(fresh: World) -> None:
    before, parts = results(fresh.open()), own_parts(fresh.open())
    report = fresh.upgrade.measure(fresh.captions, sample=SAMPLE)
    assert results(fresh.open()) == before
    assert own_parts(fresh.open()) == parts
    assert (report.images, report.sampled, report.remaining) == (IMAGES, SAMPLE, IMAGES - SAMPLE)
    assert report.hours == pytest.approx(report.remaining / report.images_per_second / 3600)
    status = fresh.upgrade.status()
    assert (status.stage, status.moved, status.remaining) == ("measured", SAMPLE, IMAGES - SAMPLE)


def test_report_of_a_better_encoder(world: World) -> None:
    report = world.upgrade.report()
    assert report is not None
    for kind in ("text", "image"):
        figures = report.kinds[kind].figures
        assert set(figures) == {"old/old", "procrustes", "slerp", "lambda", "forward", "new/new"}
        assert figures["new/new"]["hit@1"] > 0.95
        assert figures["old/old"]["hit@1"] < 0.85
        assert report.kinds[kind].queries == SAMPLE // 4
        curve = report.kinds[kind].curve
        assert curve["share"] == pytest.approx(np.linspace(0, 1, 11))
        assert curve["hit@1"][-1] == figures["new/new"]["hit@1"]
    assert report.advice == "re-embed", "36 pictures are embedded in no time"
    assert UpgradeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    text = "\n".join(report.lines())
    for part in ("colour:weak", "colour:strong", "lambda map", "embedded anew", f"{SAMPLE} of them", "advice: embed"):
        assert part in text


def test_slow_embedding_is_bridged(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval.upgrading import measuring

    monkeypatch.setattr(measuring, "QUICK_HOURS", 0.0)
    report = fresh.upgrade.measure(fresh.captions, sample=SAMPLE)
    bridged = [kind for kind, one in report.kinds.items() if one.compatible.get(one.chosen)]
    assert report.advice == ("bridge" if bridged else "re-embed")
    assert bridged, "with these seeds a bridge is compatible, else this tests nothing"


def test_a_worse_encoder_is_advised_against(measured_once: Path, tmp_path: Path) -> None:
    """The other way round: from the strong to the weak one."""
    world = World(measured_once, tmp_path, "before")
    shutil.rmtree(world.photos / ".mmalign")
    ImageIndex.build(world.photos, encoder=world.strong)
    upgrade = IndexUpgrade(world.photos, world.weak, encoder=world.strong)
    report = upgrade.measure(world.captions, sample=SAMPLE)
    assert report.advice == "none"
    assert report.kinds["text"].flips["new/new"]["negative"] > report.kinds["text"].flips["new/new"]["positive"]
    with pytest.raises(InputError, match=r"advises against.*--force"):
        upgrade.start()
    upgrade.start(force=True)
    before = world.support_hits()
    upgrade.backfill()
    after = world.support_hits()
    assert after[0] >= before[0] - 1e-9, "the old vectors answer as long as they are better"
    with pytest.raises(InputError, match=r"find less with the new encoder.*--roll-back"):
        upgrade.finish()
    upgrade.roll_back()
    assert own_parts(world.open())["encoder"]["spec"] == "colour:strong"


def test_without_captions_words_stay_with_the_old_encoder(fresh: World) -> None:
    upgrade = fresh.upgrade
    report = upgrade.measure(sample=SAMPLE)
    assert set(report.kinds) == {"image"}
    assert any("queries in words were not measured" in note for note in report.notes)
    before = [(hit.item.name, hit.score) for hit in fresh.open().search("200 40 7", k=20)]
    upgrade.start(force=True)  # 15 queries by image are too few to be clear
    upgrade.backfill()
    assert [(hit.item.name, hit.score) for hit in fresh.open().search("200 40 7", k=20)] == before
    assert any(hit.by_new for hit in fresh.open().search(fresh.photos / "0" / "000.png", k=3))
    upgrade.finish()
    assert names(fresh.open().search("200 40 7", k=20)) != [name for name, _ in before]


def test_texts_and_images_as_support(fresh: World, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"{n} {2 * n} 90" for n in range(100)), encoding="utf-8")
    (tmp_path / "more").mkdir()
    for number in range(30):
        paint(tmp_path / "more" / f"{number}.png", 1000 + number)
    bare = fresh.upgrade.measure(sample=SAMPLE).pairs
    assert fresh.upgrade.measure(tmp_path / "texts.txt", sample=SAMPLE).pairs["texts"] == bare["texts"] + 100
    assert fresh.upgrade.measure(tmp_path / "more", sample=SAMPLE).pairs["images"] == bare["images"] + 30


def test_an_encoder_trained_to_be_compatible_needs_no_pairs(fresh: World) -> None:
    trained = ColourEncoder("trained")
    upgrade = IndexUpgrade(fresh.photos, trained, encoder=fresh.weak)
    report = upgrade.measure(fresh.captions, sample=SAMPLE)
    for one in report.kinds.values():
        assert "compatible" in one.figures
        assert one.compatible["compatible"]
    upgrade.start(force=True)
    index = fresh.open()
    live = index.snapshot.upgrade
    assert live is not None
    texts = ["200 40 7", "10 90 160"]
    cut = trained.encode_texts(texts)[:, :16]
    one = live.bridge.kinds["text"]
    if one.how == "compatible":
        assert not one.needs_old
        expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        np.testing.assert_allclose(one.queries(None, trained.encode_texts(texts), 16), expected, atol=1e-6)


def test_too_few_pairs_fit_no_bridge_and_promise_nothing(fresh: World) -> None:
    images_only = IndexUpgrade(fresh.photos, fresh.strong, encoder=fresh.weak)
    report = images_only.measure(sample=8)
    assert report.pairs["images"] < 16 <= report.pairs["texts"]
    shutil.rmtree(fresh.photos / ".mmalign")
    shutil.rmtree(fresh.photos / "1")
    shutil.rmtree(fresh.photos / "2")
    shutil.rmtree(fresh.photos / "3")
    one, other = ColourEncoder("images"), ColourEncoder("strong")
    ImageIndex.build(fresh.photos, encoder=one)
    upgrade = IndexUpgrade(fresh.photos, other, encoder=one)
    report = upgrade.measure(sample=20)
    assert set(report.kinds["image"].figures) == {"old/old", "new/new"}
    assert any("no bridge was fitted: 10 pairs for spaces of 24 and 24" in note for note in report.notes)
    assert report.kinds["image"].chosen == "old"
    upgrade.start(force=True)
    upgrade.backfill()
    assert upgrade.status().modes == {"image": "merged"}, "measured again when all is embedded"
    upgrade.finish()
    assert names(fresh.open().search(fresh.photos / "0" / "000.png", k=1)) == ["0/000.png"]


# -- searching on the way ----------------------------------------------------------------------------------------------


def test_never_worse_on_the_way_and_new_at_the_end(world: World) -> None:
    old = evaluate_captions(world.open(), read_captions(world.captions), bootstrap=0)["through_index"]
    upgrade = world.upgrade
    upgrade.start(order="random")
    about = world.open().manifest["upgrade"]
    support = Bridge.read(world.photos / ".mmalign", about["bridge"]).support["text"]
    vectors = world.open().vectors
    items = {item.id: item for item in world.open()}
    rows = np.array([items[number].row for number, _ in support.answers])
    assert support.old is not None
    ranks = (support.old @ vectors.gather(np.arange(len(vectors))).T).argsort(axis=1)[:, ::-1]
    baseline = (ranks[:, 0] == rows).mean(), (ranks[:, :10] == rows[:, None]).any(axis=1).mean()
    curve = [world.support_hits()]
    while upgrade.status().remaining:
        upgrade.backfill(limit=9)
        curve.append(world.support_hits())
        assert world.open().verify() == []
    assert len(curve) == 1 + -(-(IMAGES - SAMPLE + HELD) // 9)
    for first, tenth in curve:
        assert first >= baseline[0]
        assert tenth >= baseline[1]
    assert curve[-1][0] > baseline[0] + 0.1
    upgrade.finish()
    index = world.open()
    after = evaluate_captions(index, read_captions(world.captions), bootstrap=0)["through_index"]
    rebuilt, _ = ImageIndex.build(world.photos, world.photos.parent / "rebuilt", encoder=world.strong)
    assert after == evaluate_captions(rebuilt, read_captions(world.captions), bootstrap=0)["through_index"]
    assert after["hit@1"] > old["hit@1"] + 0.1


def test_the_end_is_a_new_index(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill(checkpoint_seconds=0, batch_size=8)
    archive = upgrade.finish()
    index = world.open()
    rebuilt, _ = ImageIndex.build(world.photos, world.photos.parent / "rebuilt", encoder=world.strong)
    same_content(index, rebuilt)
    assert index.verify() == []
    assert index.manifest["upgrade"] is None
    assert index.manifest["encoder"] == rebuilt.manifest["encoder"]
    assert index.manifest["calibration"] == rebuilt.manifest["calibration"]
    for ours, theirs in zip(results(index), results(rebuilt), strict=True):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-6)
    assert upgrade.status().stage == "finished"
    assert archive is not None
    assert upgrade.status().archive == str(archive)
    generation = index.manifest["generation"]
    index.update()
    assert index.manifest["generation"] == generation, "nothing was left to do"


def test_each_image_is_embedded_once(world: World) -> None:
    assert not world.strong.encoded
    upgrade = world.upgrade
    upgrade.start()
    stop = iter([False, False, True])

    def before_batch() -> None:
        if next(stop, False):
            raise KeyboardInterrupt

    world.strong.before_batch = before_batch
    with pytest.raises(KeyboardInterrupt):
        upgrade.backfill(batch_size=8, workers=1)
    assert world.strong.encoded == 16
    assert SAMPLE - HELD + 16 <= upgrade.status().moved <= SAMPLE + 16, "what was held back is not encoded again"
    assert len(world.open().search("200 40 7", k=IMAGES)) == IMAGES
    upgrade.backfill(batch_size=8)
    assert world.strong.encoded == IMAGES - SAMPLE
    assert upgrade.status().remaining == 0


def test_hits_say_which_vectors_found_them(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    assert upgrade.status().modes == {"text": "merged", "image": "merged"}
    index = world.open()
    moved = {
        item.name for item in index if index.snapshot.upgrade and index.snapshot.upgrade.stored(item.row) is not None
    }
    assert len(moved) == SAMPLE - HELD
    hits = index.search("200 40 7", k=IMAGES)
    assert sorted(names(hits)) == sorted(item.name for item in index)
    assert {hit.item.name for hit in hits if hit.by_new} == moved
    assert [hit.rank for hit in hits] == list(range(1, IMAGES + 1))
    assert all(hit.match is not None and 0 <= hit.match <= 1 for hit in hits)
    kept = index.search("200 40 7", k=IMAGES, min_score=0.5)
    assert names(kept) == [hit.item.name for hit in hits if hit.score >= 0.5]
    assert all(hit.item.name.startswith("2/") for hit in index.search("200 40 7", k=50, where="path LIKE '2/%'"))
    assert len(index.search("200 40 7", k=50, where="path LIKE '2/%'")) == IMAGES // 4
    own = next(item for item in index if item.name in moved)
    assert own.name not in names(index.similar(own.id, k=IMAGES))
    assert len(index.similar(own.id, k=IMAGES)) == IMAGES - 1


def test_two_search_while_a_third_backfills(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    stop, failures, searched = threading.Event(), [], [0, 0]

    def search(number: int) -> None:
        try:
            index = ImageIndex.open(world.photos)
            while not stop.is_set():
                index.refresh()
                assert len(index.search("200 40 7", k=IMAGES)) == IMAGES
                searched[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    upgrade.backfill(checkpoint_seconds=0, batch_size=4)
    upgrade.finish()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert min(searched) > 3


# -- changes on the way ------------------------------------------------------------------------------------------------


def test_updates_removals_and_additions_go_on(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill(limit=10)
    index = world.open()
    caption = paint(world.photos / "new.png", 777)
    changed = paint(world.photos / "1" / "001.png", 778)
    (world.photos / "2" / "002.png").unlink()
    (world.photos / "3" / "003.png").rename(world.photos / "moved.png")
    index.remove([next(item.id for item in index if item.name == "0/004.png")])
    report = index.update()
    assert (report.added, report.changed, report.moved, report.removed) == (2, 1, 1, 1), "0/004.png is found again"
    assert names(index.search(caption, k=1)) == ["new.png"]
    assert "1/001.png" in names(index.search(changed, k=3))
    assert "2/002.png" not in names(index.search("200 40 7", k=200))
    assert len(index.search("200 40 7", k=200)) == IMAGES
    assert upgrade.status().remaining == IMAGES - upgrade.status().moved
    upgrade.backfill()
    assert upgrade.status().remaining == 0
    upgrade.finish()
    rebuilt, _ = ImageIndex.build(world.photos, world.photos.parent / "rebuilt", encoder=world.strong)
    same_content(world.open(), rebuilt)


def test_rows_are_renumbered_under_it(world: World) -> None:
    """Removing a third drops the dead rows, and all that was known by row number must follow."""
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill(limit=10)
    index = world.open()
    for number in range(0, IMAGES, 3):
        (world.photos / f"{number % 4}" / f"{number:03}.png").unlink()
    index.update()
    assert len(index.vectors) == IMAGES * 2 // 3
    live = index.snapshot.upgrade
    assert live is not None
    for item in index:
        stored = live.stored(item.row)
        if stored is not None:
            np.testing.assert_allclose(stored, world.strong.encode_images([item.path]), atol=1e-6)
    upgrade.backfill()
    upgrade.finish()
    rebuilt, _ = ImageIndex.build(world.photos, world.photos.parent / "rebuilt", encoder=world.strong)
    same_content(world.open(), rebuilt)


def test_changes_while_embedding(world: World) -> None:
    """Another writer removes and adds in the middle of a run, which lets it in."""
    upgrade = world.upgrade
    upgrade.start(order="random")
    other = world.open()
    gone = next(item for item in other if other.snapshot.upgrade and other.snapshot.upgrade.stored(item.row) is None)
    done: list[bool] = []

    def change() -> None:
        if not done:
            done.append(True)
            paint(world.photos / "late.png", 901)
            gone.path.unlink()
            assert other.update().added == 1

    world.strong.before_batch = change
    upgrade.backfill(batch_size=4)
    world.strong.before_batch = lambda: None
    status = upgrade.status()
    assert (status.images, status.remaining, status.left_out) == (IMAGES, 0, 0)
    upgrade.finish()
    rebuilt, _ = ImageIndex.build(world.photos, world.photos.parent / "rebuilt", encoder=world.strong)
    same_content(world.open(), rebuilt)


# -- images that cannot be embedded ------------------------------------------------------------------------------------


def spoil(world: World) -> dict[str, str]:
    """Reasons by name of images of the rest that are gone, changed, and no image any more."""
    index = world.open()
    assert index.snapshot.upgrade is not None
    rest = sorted(item.name for item in index if index.snapshot.upgrade.stored(item.row) is None)[:3]
    gone, changed, broken = (world.photos / name for name in rest)
    gone.unlink()
    paint(changed, 555)
    broken.write_bytes(b"no image")
    return dict(zip(rest, ("missing", "changed", "changed"), strict=True))


def test_originals_that_are_gone_keep_mapped_vectors(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    reasons = spoil(world)
    upgrade.backfill()
    assert {entry["path"].removeprefix(f"{world.photos}/"): entry["reason"] for entry in upgrade.left_out()} == reasons
    status = upgrade.status()
    assert (status.left_out, status.remaining) == (3, 0)
    old = {item.name: world.open().vectors.gather(np.array([item.row]))[0] for item in world.open()}
    upgrade.finish()
    index = world.open()
    assert len(index) == IMAGES
    flagged = {item.name for item in index if "mapped" in item.flags}
    assert flagged == set(reasons)
    kept = names(index.search("200 40 7", k=IMAGES, where="flags NOT LIKE '%mapped%'"))
    assert sorted(kept) == sorted(set(old) - flagged)
    pairs = [item for item in index if item.name not in flagged]
    x = np.stack([old[item.name] for item in pairs]).astype(np.float64)
    y = np.stack([index.vectors.gather(np.array([item.row]))[0] for item in pairs]).astype(np.float64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    ridge = np.linalg.solve(xc.T @ xc + 0.1 * (xc**2).sum() / xc.shape[1] * np.eye(xc.shape[1]), xc.T @ yc)
    for item in index:
        if item.name in flagged:
            expected = (old[item.name] - x.mean(0)) @ ridge + y.mean(0)
            found = index.vectors.gather(np.array([item.row]))[0]
            np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-4)
    # What is back is embedded, what has changed is read as a change.
    gone = next(name for name, reason in reasons.items() if reason == "missing")
    paint(world.photos / gone, int(Path(gone).stem))
    index.update()
    item = next(item for item in index if item.name == gone)
    assert "mapped" not in item.flags
    np.testing.assert_allclose(
        index.vectors.gather(np.array([item.row])), world.strong.encode_images([item.path]), atol=1e-6
    )
    assert {item.name for item in index if "mapped" in item.flags} == set()
    assert index.verify() == []


def test_originals_that_come_back_are_embedded(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    aside = world.photos.parent / "aside"
    (world.photos / "3").rename(aside)
    upgrade.backfill()
    assert upgrade.status().left_out > 0
    aside.rename(world.photos / "3")
    upgrade.backfill()
    assert (upgrade.status().left_out, upgrade.left_out()) == (0, [])


def test_what_is_gone_can_be_dropped(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    reasons = spoil(world)
    with pytest.raises(InputError, match=r"66 images have not been embedded yet"):
        upgrade.finish()
    upgrade.backfill()
    upgrade.finish(gone="drop")
    assert {item.name for item in world.open()} & set(reasons) == set()
    assert len(world.open()) == IMAGES - 3


def test_an_index_of_vectors_alone_is_mapped_as_far_as_it_can_be(world: World, tmp_path: Path) -> None:
    vectors = world.open().vectors.gather(np.arange(IMAGES))
    ImageIndex.from_vectors(vectors, tmp_path / "bare", encoder=world.weak)
    upgrade = IndexUpgrade(tmp_path / "bare", world.strong, encoder=world.weak)
    report = upgrade.measure(sample=20)
    assert report.kinds == {}
    assert {entry["reason"] for entry in upgrade.left_out()} == {"no_original"}
    upgrade.start()
    upgrade.backfill()
    with pytest.raises(InputError, match=r"96 images could not be embedded.*too few to map"):
        upgrade.finish()


# -- going back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["measuring", "measured", "started", "half", "all", "finished"])
def test_rolled_back_at_any_stage(fresh: World, stage: str) -> None:
    before, parts = results(fresh.open()), own_parts(fresh.open())
    table = fresh.open().items.table
    upgrade = fresh.upgrade
    if stage == "measuring":

        def stop() -> None:
            raise KeyboardInterrupt

        fresh.strong.before_batch = stop
        with pytest.raises(KeyboardInterrupt):
            upgrade.measure(fresh.captions, sample=SAMPLE)
        fresh.strong.before_batch = lambda: None
        assert upgrade.status().stage == "measuring"
    else:
        upgrade.measure(fresh.captions, sample=SAMPLE)
    if stage not in ("measuring", "measured"):
        upgrade.start()
        assert results(fresh.open()) != before
    if stage in ("half", "all", "finished"):
        upgrade.backfill(limit=18 if stage == "half" else None)
    if stage == "finished":
        upgrade.finish()
    upgrade.roll_back()
    index = fresh.open()
    assert results(index) == before
    assert own_parts(index) == parts
    assert index.items.table.equals(table)
    assert index.verify() == []
    assert upgrade.status().stage == "none"
    kinds = {path.name.split("-")[0] for path in index.folder.iterdir() if "-" in path.name}
    assert "archive" not in kinds
    with pytest.raises(InputError, match="nothing to roll back"):
        upgrade.roll_back()


def test_the_archive_is_an_index_of_its_own(world: World) -> None:
    world_before = World(world.photos.parent, world.photos.parent / "kept", "photos")
    before = results(world_before.open())
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill()
    archive = upgrade.finish()
    assert archive is not None
    old = ImageIndex.open(archive)
    assert old.verify() == []
    assert [[name for name, _ in found] for found in results(old)] == [[name for name, _ in found] for found in before]
    assert names(old.search(world.photos / "0" / "000.png", k=1)) == ["0/000.png"], "its folder is found from there"
    old.update()
    assert len(old) == IMAGES
    shutil.rmtree(archive)
    assert upgrade.status().stage == "none"
    assert world.open().verify() == []


def test_finished_without_an_archive(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill()
    assert upgrade.finish(keep_old=False) is None
    with pytest.raises(InputError, match="none is archived"):
        upgrade.roll_back()
    assert not list((world.photos / ".mmalign").glob("archive-*"))


# -- what is refused ---------------------------------------------------------------------------------------------------


def _measured_again(world: World) -> None:
    world.upgrade.start()
    world.upgrade.measure()


def _another_encoder(world: World) -> None:
    IndexUpgrade(world.photos, ColourEncoder("images"), encoder=world.weak).measure()


def _changed_weights(world: World) -> None:
    world.strong.model.rotation += 1
    world.strong._fingerprint = None
    world.upgrade.backfill()


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (_measured_again, InputError, "running already.*--roll-back"),
        (
            _another_encoder,
            EncoderMismatchError,
            "being upgraded to 'colour:strong'.*not to 'colour:images'.*--roll-back",
        ),
        (_changed_weights, EncoderMismatchError, "being upgraded to 'colour:strong'"),
        (lambda w: w.upgrade.backfill(), InputError, "not running"),
        (lambda w: w.upgrade.finish(), InputError, "not been started"),
        (lambda w: w.upgrade.finish(gone="burn"), InputError, "gone is 'burn'; give one of map, drop"),
        (lambda w: w.upgrade.start(order="colour"), InputError, "order is 'colour'; give auto, density"),
        (lambda w: w.upgrade.start(order="access"), InputError, "names no column; give access:COLUMN"),
        (lambda w: w.upgrade.start(order="access:views"), InputError, "no metadata column 'views'"),
        (lambda w: w.upgrade.measure("nowhere.jsonl"), InputError, "nowhere.jsonl"),
        (lambda w: w.upgrade.measure(sample=1), InputError, "sample is 1; give 2 or more"),
    ],
)
def test_refused(world: World, act: Callable[[World], object], error: type[Exception], message: str) -> None:
    before = (world.photos / ".mmalign" / "CURRENT").read_text()
    with pytest.raises(error, match=f"(?s){message}"):
        act(world)
    if act is not _measured_again:
        assert (world.photos / ".mmalign" / "CURRENT").read_text() == before


def test_refused_before_it_begins(fresh: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="index's own encoder"):
        IndexUpgrade(fresh.photos, ColourEncoder("weak"), encoder=fresh.weak).measure()
    with pytest.raises(InputError, match="has no text tower, and the index answers such queries"):
        IndexUpgrade(fresh.photos, ColourEncoder("images"), encoder=fresh.weak).measure()
    with pytest.raises(EncoderMismatchError, match="made with 'colour:weak'"):
        IndexUpgrade(fresh.photos, ColourEncoder("strong"), encoder=ColourEncoder("images")).measure()
    with pytest.raises(InputError, match="no upgrade of this index is under way"):
        _ = IndexUpgrade(fresh.photos).new_encoder
    (tmp_path / "foreign.jsonl").write_text('{"file": "elsewhere.png", "caption": "1 2 3"}')
    with pytest.raises(InputError, match="none of the 1 captioned files of the support set is in the index"):
        fresh.upgrade.measure(tmp_path / "foreign.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no text"):
        fresh.upgrade.measure(tmp_path / "empty.txt")
    assert Store(fresh.photos / ".mmalign").read_manifest()["upgrade"] is None


def test_an_encoder_known_by_its_spec(world: World) -> None:
    """Nothing is given: what was recorded is loaded, and `--encoder` may be either of the two."""
    IndexUpgrade(world.photos).start()
    before = world.upgrade.status().moved
    IndexUpgrade(world.photos).backfill(limit=5)
    assert world.upgrade.status().moved == before + 5
    expected = results(ImageIndex.open(world.photos))
    new = ImageIndex.open(world.photos).new_encoder
    assert new is not None
    assert new.fingerprint == world.strong.fingerprint
    for given in (world.weak, world.strong, "colour:weak", "colour:strong"):
        assert results(ImageIndex.open(world.photos, encoder=given)) == expected
    with pytest.raises(EncoderMismatchError):
        ImageIndex.open(world.photos, encoder=ColourEncoder("images"))


def test_order_by_the_users_columns(world: World) -> None:
    lines = ["file,views,kind"] + [f"{n:03}.png,{(n * 37) % 101},{'even' if n % 2 else 'odd'}" for n in range(IMAGES)]
    (world.photos / "metadata.csv").write_text("\n".join(lines))
    world.open().update()
    upgrade = world.upgrade
    upgrade.start(order="access:views")
    upgrade.backfill(limit=5)
    index = world.open()
    live = index.snapshot.upgrade
    assert live is not None
    rest = {item.row: (int(Path(item.name).stem) * 37) % 101 for item in index}
    newest = live.places[SAMPLE - HELD :].tolist()
    old = set(live.places[: SAMPLE - HELD].tolist())
    expected = sorted((row for row in rest if row not in old), key=lambda row: -rest[row])[:5]
    assert newest == expected
    upgrade.roll_back()
    upgrade.measure(world.captions, sample=SAMPLE, order="class-mean:kind")
    upgrade.start(order="class-mean:kind")
    paint(world.photos / "unknown.png", 444)
    world.open().update()
    upgrade.roll_back()
    with pytest.raises(InputError, match="1 of 97 images have no value in column 'views'"):
        upgrade.measure(world.captions, sample=SAMPLE, order="access:views")


def test_a_colour_is_what_its_caption_says() -> None:
    """The world of these tests: else they would test nothing."""
    strong, weak = ColourEncoder("strong"), ColourEncoder("weak")
    np.testing.assert_allclose(colour_of("255 0 51"), [1, 0, 0.2])
    for encoder, least in ((strong, 0.9), (weak, 0.5)):
        a, b, c = encoder.encode_texts(["200 40 7", "198 42 9", "10 90 160"])
        assert a @ b > least > a @ c


def test_density_puts_the_most_isolated_first(fresh: World) -> None:
    from mmalign.partial_backfill import local_density
    from retrieval.upgrading.ordering import backfill_rows

    index = fresh.open()
    rows = backfill_rows(index.snapshot, "density")
    density = local_density(index.vectors.gather(np.arange(len(index.vectors))), neighbours=10)
    assert rows.tolist() == np.argsort(density, kind="stable").tolist()
