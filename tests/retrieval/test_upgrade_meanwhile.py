"""What others do while an index is upgraded, and long after: readers, writers, archives, stale answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from colour_encoder import ColourEncoder, paint, paint_folder
from drawing import names, same_content
from upgrade_world import IMAGES, SAMPLE, World, results

from mmalign.errors import EncoderMismatchError, IndexDamagedError, IndexLockedError, InputError
from retrieval import ImageIndex, IndexUpgrade, faiss_index
from retrieval.storage import Store
from retrieval.upgrading.bridge import Bridge
from retrieval.upgrading.checking import measure_modes
from retrieval.upgrading.embedding import RowOfItem


def finished(world: World) -> Path:
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill()
    archive = upgrade.finish()
    assert archive is not None
    return archive


# -- readers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", ["never", "always"])
def test_a_reader_outlives_an_upgrade_and_its_undoing(world: World, look: str) -> None:
    reader = ImageIndex.open(world.photos, encoder=world.weak)
    before = results(reader)
    upgrade = world.upgrade
    for step in (upgrade.start, upgrade.backfill, upgrade.finish):
        step()
        if look == "always":
            reader.refresh()
            results(reader)
    reader.refresh()
    assert results(reader) == results(ImageIndex.open(world.photos))
    upgrade.roll_back()
    reader.refresh()
    assert results(reader) == before


def test_a_refresh_in_the_middle_of_a_search(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = world.upgrade
    upgrade.start()
    upgrade.backfill()
    reader = ImageIndex.open(world.photos)
    expected = names(reader.search("200 40 7"))
    real = ImageIndex._encoder_of

    def meanwhile(self: ImageIndex, about: dict[str, object]) -> object:
        if world.upgrade.status().stage == "running":
            world.upgrade.finish()
            self.refresh()
        return real(self, about)

    monkeypatch.setattr(ImageIndex, "_encoder_of", meanwhile)
    assert names(reader.search("200 40 7")) == expected


def test_an_old_snapshot_tells_what_it_was(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    reader = ImageIndex.open(world.photos)
    told = reader.info()["upgrade"]
    assert told["moved"] == upgrade.status().moved
    upgrade.backfill(batch_size=4, checkpoint_seconds=0)
    upgrade.finish()
    assert reader.info()["upgrade"] == told


def test_opening_while_files_are_cleared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first manifest is superseded in the middle of opening, by one with more rows."""
    world.upgrade.start()
    writer = world.open()
    paint(world.photos / "late.png", 600)
    real = Bridge.read
    done: list[bool] = []

    def read(folder: Path, about: dict[str, object]) -> Bridge:
        if not done:
            done.append(True)
            writer.update()
            raise IndexDamagedError("gone")
        return real(folder, about)

    monkeypatch.setattr(Bridge, "read", staticmethod(read))
    index = world.open()
    assert index.snapshot.alive.sum() == len(index) == IMAGES + 1
    assert len(index.search("200 40 7", k=200)) == IMAGES + 1


def test_the_faiss_index_is_cleared_while_it_is_opened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there when a reader begins to open it, and gone two generations later; the vectors must do."""
    expected = results(ImageIndex.open(world.photos))
    reader = world.open()
    real, cleared = faiss_index.read, []

    def read(path: Path, parameters: dict[str, int]) -> object:
        if not cleared:
            assert path.exists()
            cleared.append(path)
            paint(world.photos / "late.png", 600)
            world.open().update()
            path.unlink()  # as a writer does with what no manifest in force names
        return real(path, parameters)

    monkeypatch.setattr(faiss_index, "read", read)
    assert results(reader) == expected
    assert cleared


def test_another_index_in_its_place_is_refused(world: World, tmp_path: Path) -> None:
    """An encoder that was given is not exchanged in silence, unless the index says that it was upgraded."""
    import shutil

    reader = ImageIndex.open(world.photos, encoder=world.weak)
    world.upgrade.roll_back()
    shutil.rmtree(world.photos / ".mmalign")
    ImageIndex.build(world.photos, encoder=world.strong)
    reader.refresh()
    with pytest.raises(EncoderMismatchError):
        reader.search("200 40 7")


# -- writers -----------------------------------------------------------------------------------------------------------


def test_brief_writers_are_waited_for(world: World) -> None:
    store = Store(world.photos / ".mmalign")
    entered, leave = threading.Event(), threading.Event()

    def hold(brief: bool) -> None:
        with store.write(brief=brief):
            entered.set()
            leave.wait(10)

    for brief in (True, False):
        entered.clear()
        leave.clear()
        holder = threading.Thread(target=hold, args=(brief,))
        holder.start()
        entered.wait(10)
        if brief:
            threading.Timer(0.3, leave.set).start()
            world.open().remove([1])
            assert leave.is_set(), "it waited"
        else:
            with pytest.raises(IndexLockedError):
                world.open().remove([2])
            leave.set()
        holder.join()


def test_embedding_goes_on_while_another_writes(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    store, leave, held = Store(world.photos / ".mmalign"), threading.Event(), threading.Event()
    batches: list[float] = []

    def before_batch() -> None:
        batches.append(time.monotonic())
        if len(batches) == 5:
            leave.set()

    def hold() -> None:
        with store.write():
            held.set()
            leave.wait(20)

    world.strong.before_batch = before_batch
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    upgrade.backfill(batch_size=4, checkpoint_seconds=0)
    thread.join()
    assert len(batches) >= 5, "five batches were encoded although nothing could be published"
    assert upgrade.status().remaining == 0


def test_content_that_changes_while_it_is_embedded(world: World) -> None:
    """The vector of what a file held must not be entered for what it holds by now."""
    upgrade = world.upgrade
    upgrade.start(order="random")
    index = world.open()
    assert index.snapshot.upgrade is not None
    victim = next(item for item in index if index.snapshot.upgrade.stored(item.row) is None)
    done: list[bool] = []

    def change() -> None:
        if done:
            return
        done.append(True)
        # All of this run have been read by now, or will be found to have changed.
        paint(victim.path, 4321)
        assert index.update().changed == 1

    world.strong.before_batch = change
    upgrade.backfill(batch_size=200)
    world.strong.before_batch = lambda: None
    upgrade.backfill()
    upgrade.finish()
    fresh, _ = ImageIndex.build(world.photos, world.photos.parent / "rebuilt", encoder=world.strong)
    same_content(world.open(), fresh)


def test_vectors_that_are_no_numbers_are_left_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = world.upgrade
    upgrade.start()
    real = ColourEncoder.encode_pixels

    def broken(self: ColourEncoder, pixels: object) -> np.ndarray:
        rows = real(self, pixels)  # type: ignore[arg-type]
        rows[0] = np.nan
        return rows

    monkeypatch.setattr(ColourEncoder, "encode_pixels", broken)
    upgrade.backfill(batch_size=12)
    assert {entry["reason"] for entry in upgrade.left_out()} == {"no_vector"}
    assert world.open().verify() == []
    monkeypatch.undo()
    upgrade.backfill()
    assert upgrade.left_out() == []


def test_images_added_once_all_is_embedded_are_found(fresh: World) -> None:
    """Also where old and new vectors have no common scale, for want of captions."""
    lines = fresh.captions.read_text().splitlines()[:3]
    fresh.captions.write_text("\n".join(lines))
    upgrade = fresh.upgrade
    upgrade.measure(fresh.captions, sample=SAMPLE)
    upgrade.start(force=True)
    upgrade.backfill()
    for number in range(3):
        caption = paint(fresh.photos / f"late{number}.png", 600 + number)
        fresh.open().update()
        assert f"late{number}.png" in names(fresh.open().search(caption, k=5))
    assert len(fresh.open().search("200 40 7", k=200)) == IMAGES + 3


def test_images_added_after_the_rest_was_indexed_are_found(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval.upgrading import checking

    monkeypatch.setattr(checking, "LEAST_REST", 10)
    upgrade = fresh.upgrade
    upgrade.measure(fresh.captions, sample=SAMPLE)
    upgrade.start()
    upgrade.backfill(limit=30)
    assert fresh.open().manifest["upgrade"]["rest"] is not None
    assert len(fresh.open().search("200 40 7", k=200)) == IMAGES
    caption = paint(fresh.photos / "late.png", 600)
    fresh.open().update()
    assert "late.png" in names(fresh.open().search(caption, k=8))
    assert len(fresh.open().search("200 40 7", k=200)) == IMAGES + 1
    assert fresh.open().verify() == []


def test_modes_are_measured_at_every_write(world: World) -> None:
    """Whatever is removed, at no published stage does the mode lose against the old encoder."""
    upgrade = world.upgrade
    upgrade.start()
    random = np.random.default_rng(0)
    for _ in range(6):
        index = world.open()
        index.remove(random.choice([item.id for item in index], 8, replace=False).tolist())
        if random.random() < 0.5:
            upgrade.backfill(limit=5)
        index = world.open()
        live = index.snapshot.upgrade
        assert live is not None
        support = Bridge.read(index.folder, live.about["bridge"]).support
        for kind, queries in support.items():
            figures = measure_modes(live, kind, queries, RowOfItem(index.items))
            if figures:
                chosen = figures[live.mode(kind)]
                assert chosen[0] >= figures["old"][0]
                assert chosen[1] >= figures["old"][1]


def test_all_images_removed(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    index = world.open()
    index.remove([item.id for item in index])
    assert world.open().search("200 40 7") == []
    assert upgrade.status().images == 0
    upgrade.roll_back()
    assert len(world.open()) == 0


def test_answers_that_have_changed_judge_nothing(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start()
    for number in range(IMAGES):
        paint(world.photos / f"{number % 4}" / f"{number:03}.png", 5000 + number)
    world.open().update()
    assert upgrade.status().modes == {}
    assert not any(hit.by_new for hit in world.open().search("200 40 7", k=IMAGES))


def test_removals_while_a_sample_is_embedded(fresh: World) -> None:
    other = fresh.open()
    victim = list(other)[7]

    def remove() -> None:
        fresh.strong.before_batch = lambda: None
        other.remove([victim.id])

    fresh.strong.before_batch = remove
    report = fresh.upgrade.measure(fresh.captions, sample=SAMPLE)
    assert report.sampled in (SAMPLE, SAMPLE - 1)
    assert not any("could not be embedded" in note for note in report.notes)


def test_left_out_is_forgotten_with_its_reason(world: World) -> None:
    upgrade = world.upgrade
    upgrade.start(order="random")
    index = world.open()
    assert index.snapshot.upgrade is not None
    rest = [item for item in index if index.snapshot.upgrade.stored(item.row) is None][:4]
    for item in rest:
        item.path.write_bytes(b"no image")
    upgrade.backfill()
    assert len(upgrade.left_out()) == 4
    rest[0].path.unlink()
    paint(rest[1].path, 808)
    index.refresh()
    index.update()  # two are gone from the index, one has other content, one more is no image
    status = upgrade.status()
    assert (status.left_out, status.remaining) == (0, 1)
    with pytest.raises(InputError, match="1 images have not been embedded"):
        upgrade.finish()
    upgrade.backfill()
    upgrade.finish()
    assert not any("mapped" in item.flags for item in world.open())


# -- archives ----------------------------------------------------------------------------------------------------------


def test_an_archive_that_lived_on_comes_back_whole(world: World) -> None:
    archive = finished(world)
    old = ImageIndex.open(archive)
    for number in range(5):  # its generations catch up with those of the index around it
        paint(world.photos.parent / f"more{number}.png", 900 + number)
        old.add([world.photos.parent / f"more{number}.png"])
    expected = results(old)
    world.upgrade.roll_back()
    index = world.open()
    assert index.verify() == []
    assert len(index) == IMAGES + 5
    assert results(index) == expected


def test_what_was_written_since_is_not_thrown_away(world: World) -> None:
    archive = finished(world)
    paint(world.photos / "late.png", 600)
    world.open().update()
    with pytest.raises(InputError, match=r"would be lost.*--force"):
        world.upgrade.roll_back()
    assert len(world.open()) == IMAGES + 1
    world.upgrade.roll_back(force=True)
    assert len(world.open()) == IMAGES
    assert not archive.exists()


def test_a_damaged_archive_changes_nothing(world: World) -> None:
    archive = finished(world)
    victim = next(archive.glob("vectors-*"))
    data = victim.read_bytes()
    victim.unlink()  # the index around it may hold the same file
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = results(world.open())
    with pytest.raises(Exception, match=r"archive .* is damaged: vectors"):
        world.upgrade.roll_back()
    assert results(world.open()) == before
    assert archive.exists()


def test_two_upgrades_in_a_row(world: World) -> None:
    first = finished(world)
    again = IndexUpgrade(world.photos, world.weak, encoder=world.strong)
    again.measure(world.captions, sample=SAMPLE)
    again.start(force=True)
    again.backfill()
    (world.photos / ".mmalign" / "archive-000001").mkdir()  # of a run that was stopped
    second = again.finish(force=True)
    folder = world.photos / ".mmalign"
    assert sorted(folder.glob("archive-*")) == sorted([first, second])  # type: ignore[type-var]
    again.roll_back()
    assert world.open().manifest["encoder"]["spec"] == "colour:strong"
    assert first.exists()
    world.upgrade.roll_back(force=True)
    assert world.open().manifest["encoder"]["spec"] == "colour:weak"
    assert not list(folder.glob("archive-*"))


def test_folders_of_others_are_left_alone(world: World) -> None:
    other = world.photos / ".mmalign" / ".archive-of-mine"
    other.mkdir()
    finished(world)
    world.upgrade.roll_back()
    assert other.is_dir()


def test_another_encoder_by_name_is_refused_at_every_step(world: World) -> None:
    other = IndexUpgrade(world.photos, ColourEncoder("trained"), encoder=world.weak)
    with pytest.raises(EncoderMismatchError):
        other.start(force=True)
    assert world.upgrade.status().stage == "measured"
    world.upgrade.start()
    world.upgrade.backfill()
    with pytest.raises(EncoderMismatchError):
        other.finish()


def test_merged_indexes_prefer_encoded_vectors_to_mapped_ones(tmp_path: Path) -> None:
    from retrieval import merge_indexes

    weak, strong = ColourEncoder("weak"), ColourEncoder("strong")
    captions = paint_folder(tmp_path / "a", 60)
    ImageIndex.build(tmp_path / "a", encoder=weak)
    upgrade = IndexUpgrade(tmp_path / "a", strong, encoder=weak)
    upgrade.measure(captions, sample=40)
    upgrade.start(force=True)
    index = ImageIndex.open(tmp_path / "a")
    assert index.snapshot.upgrade is not None
    lost = next(item for item in index if index.snapshot.upgrade.stored(item.row) is None)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(lost.path.read_bytes())
    lost.path.unlink()
    upgrade.backfill()
    upgrade.finish()
    ImageIndex.build(tmp_path / "b", encoder=strong)
    merged = merge_indexes([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    item = next(item for item in merged if item.name == "x.png")
    found = merged.vectors.gather(np.array([item.row]))
    np.testing.assert_allclose(found, strong.encode_images([item.path]), atol=1e-6)
    assert "mapped" not in item.flags
