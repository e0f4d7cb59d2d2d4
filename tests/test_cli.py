"""The command line as a person meets it, with the bundled encoder on real photographs."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from mmalign import cli

if TYPE_CHECKING:
    from mmalign import Encoder

Run = Callable[..., Any]


@pytest.fixture
def run(command_line: Run) -> Run:
    return command_line


@pytest.fixture(autouse=True)
def bundled_loaded_once(bundled: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the session's encoder for each command, except for those that are processes of their own."""
    monkeypatch.setattr("mmalign.encoders.bundled.load_bundled", lambda: copy.deepcopy(bundled))
    # Timing both takes a third of a second, which `photo_index` and the tests of encoders do.
    monkeypatch.setattr("mmalign.encoders.encoder.fastest_cpu_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="session")
def photo_index(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample photographs, indexed by a real process."""
    folder = tmp_path_factory.mktemp("cli") / "index"
    command = [sys.executable, "-m", "mmalign.cli", "index", photos, "--out", folder, "--encoder", "bundled"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "76 images" in done.stderr
    assert "weak on people" in done.stderr, "the limits of the bundled encoder are said where it is used"
    return folder


@pytest.fixture
def index_copy(photo_index: Path, tmp_path: Path) -> Path:
    """An index to break."""
    return shutil.copytree(photo_index, tmp_path / "index")


def names(result: Result) -> list[str]:
    return [Path(line).name for line in result.out.splitlines()]


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "category"), [("an elephant", "elephant"), ("pizza", "pizza"), ("a bus", "bus"), ("horses", "horse")]
)
def test_words_find_photographs(run: Run, photo_index: Path, captions: list[dict], query: str, category: str) -> None:
    found = run("search", photo_index, query, "-k", "1", "--paths")
    row = next(row for row in captions if row["file"] == names(found)[0])
    shown = {thing["category"] for thing in row["objects"]} | set(" ".join(row["captions"]).lower().split())
    assert any(word.startswith(category) for word in shown)


def test_reference_figures_through_the_command_line(run: Run, photo_index: Path, photos: Path) -> None:
    result = json.loads(run("eval", "retrieval", photo_index, "--captions", photos / "captions.jsonl", "--json").out)
    assert result["captions"] == 380
    assert result["text_to_image"]["hit@1"] >= 0.40
    assert result["text_to_image"]["hit@5"] >= 0.78
    assert result["text_to_image"]["hit@10"] >= 0.90
    assert result["image_to_text"]["hit@1"] >= 0.41
    assert result["image_to_text"]["hit@10"] >= 0.82
    assert result["through_index"]["hit@1"] == pytest.approx(result["text_to_image"]["hit@1"])


def test_an_image_finds_itself_and_similar_leaves_it_out(run: Run, photo_index: Path, photos: Path) -> None:
    photo = photos / "000000519208.jpg"
    assert names(run("search", photo_index, photo, "-k", "1", "-p")) == [photo.name]
    assert photo.name not in names(run("similar", photo_index, photo, "-k", "5", "-p"))


def test_minus_moves_away(run: Run, photo_index: Path) -> None:
    plain = [json.loads(line) for line in run("search", photo_index, "a cat", "-k", "76", "--json").out.splitlines()]
    minus = run("search", photo_index, "a cat", "--minus", "a bathroom", "-k", "76", "--json").out.splitlines()
    toilet_cat = "000000358083.jpg"  # a cat at a toilet's mirror
    rank = {hit["name"]: hit["rank"] for hit in plain}
    rank_after = {hit["name"]: hit["rank"] for hit in map(json.loads, minus)}
    assert rank_after[toilet_cat] > rank[toilet_cat]


def test_filters_from_the_command_line(run: Run, photo_index: Path, photos: Path) -> None:
    tall = {path.name for path in photos.glob("*.jpg") if (size := Image.open(path).size)[0] < size[1]}
    found = run("search", photo_index, "a dog", "-k", "76", "-p", "--where", "width < height")
    assert set(names(found)) == tall


def test_nothing_matches_is_an_answer(run: Run, photo_index: Path) -> None:
    result = run("search", photo_index, "qwx zzv", "--min-match", "0.95")
    assert result.code == cli.NO_RESULT
    assert result.out == ""
    assert "nothing here matches" in result.err


def test_grid_shows_the_hits(run: Run, photo_index: Path, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "hits.png"
    run("search", photo_index, "an elephant", "-k", "2", "--grid", picture)
    drawn = Image.open(picture).convert("RGB")
    elephant = Image.open(photos / "000000519208.jpg").convert("RGB")
    # The first cell holds the elephant: compare the mean colour of its middle with the photograph's.
    cell = drawn.crop((12 + 92, 52 + 92, 12 + 132, 52 + 132)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    width, height = elephant.size
    scale = max(width, height) / 224
    box = (width / 2 - 20 * scale, height / 2 - 20 * scale, width / 2 + 20 * scale, height / 2 + 20 * scale)
    middle = elephant.crop(tuple(map(int, box))).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(cell, middle, strict=True)) < 12


def test_null_separated_paths_survive_odd_names(run: Run, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = [b"new\nline.jpg", b"bad\xff.jpg", "snow ☃.jpg".encode()]
    sources = sorted(photos.glob("*.jpg"))[:3]
    for source, name in zip(sources, odd, strict=True):
        shutil.copyfile(source, os.path.join(os.fsencode(folder), name))
    assert run("index", folder, "--encoder", "bundled", "-q").code == 0
    command = [sys.executable, "-m", "mmalign.cli", "search", folder, "a picture", "-0"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    assert {path.rpartition(b"/")[2] for path in listed.split(b"\0")[:-1]} == set(odd)
    assert all(Path(os.fsdecode(path)).exists() for path in listed.split(b"\0")[:-1])


def test_the_index_may_be_left_out_inside_its_folder(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("000000519208.jpg", "000000160012.jpg"):
        shutil.copy(photos / name, tmp_path)
    run("index", tmp_path, "--encoder", "bundled", "-q")
    monkeypatch.chdir(tmp_path)
    assert names(run("search", "an elephant", "-k", "1", "-p")) == ["000000519208.jpg"]


def test_second_run_reads_nothing(run: Run, photo_index: Path, photos: Path) -> None:
    again = run("index", photos, "--out", photo_index)
    assert again.code == 0
    assert "76 unchanged" in again.err
    assert "new" not in again.err


def test_duplicates_lists_copies(run: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path / "one.jpg")
    shutil.copy(photos / "000000519208.jpg", tmp_path / "two.jpg")
    shutil.copy(photos / "000000160012.jpg", tmp_path / "three.jpg")
    run("index", tmp_path, "--encoder", "bundled", "-q")
    assert names(run("duplicates", tmp_path, "--paths")) == ["two.jpg"]
    (tmp_path / "two.jpg").unlink()
    run("index", tmp_path, "-q")
    assert run("duplicates", tmp_path).code == cli.NO_RESULT


def test_deleting_what_duplicates_lists_keeps_every_picture(run: Run, photos: Path, tmp_path: Path) -> None:
    """Links before and after their file in the alphabet, hard and symbolic, into and out of the indexed folder."""
    folder, outside = tmp_path / "pics", tmp_path / "outside.jpg"
    folder.mkdir()
    sources = sorted(photos.glob("*.jpg"))[:4]
    for name, source in zip(("b1.jpg", "b2.jpg", "b3.jpg"), sources, strict=False):
        shutil.copy(source, folder / name)
    (folder / "a1.jpg").symlink_to("b1.jpg")
    (folder / "c1.jpg").symlink_to(folder / "b1.jpg")
    (folder / "a2.jpg").symlink_to("b2.jpg")
    shutil.copy(sources[1], folder / "z2.jpg")  # a real copy
    (folder / "a3.jpg").hardlink_to(folder / "b3.jpg")
    shutil.copy(sources[3], outside)
    (folder / "a4.jpg").symlink_to(outside)
    shutil.copy(sources[3], folder / "b4.jpg")
    wanted = {path.read_bytes() for path in folder.glob("*.jpg")}
    run("index", folder, "--encoder", "bundled", "-q")

    groups = [json.loads(line) for line in run("duplicates", folder, "--json").out.splitlines()]
    links = {Path(a).name: Path(b).name for group in groups for a, b in group["link_of"].items()}
    assert (links["a1.jpg"], links["c1.jpg"], links["a2.jpg"]) == ("b1.jpg", "b1.jpg", "b2.jpg")
    assert not any(Path(group["paths"][0]).is_symlink() for group in groups)
    listed = run("duplicates", folder, "-0").out.split("\0")[:-1]
    assert {Path(path).name for path in listed} == {"z2.jpg", "a4.jpg"}
    assert run("duplicates", folder, "--paths").out.splitlines() == listed
    for path in listed:
        Path(path).unlink()
    assert {path.read_bytes() for path in folder.glob("*.jpg")} == wanted


def test_duplicates_lists_nothing_whose_original_changed_or_vanished(run: Run, photos: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(photos / "000000519208.jpg", tmp_path / name)
    run("index", tmp_path, "--encoder", "bundled", "-q")
    shutil.copy(photos / "000000160012.jpg", tmp_path / "a.jpg")
    assert run("duplicates", tmp_path, "--paths").out == ""
    (tmp_path / "a.jpg").unlink()
    gone = run("duplicates", tmp_path, "--paths")
    assert (gone.code, gone.out) == (cli.NO_RESULT, "")


# -- errors: one line, the value, the remedy, an exit code -------------------------------------------------------------


def complaint(result: Result, *parts: str) -> None:
    assert result.code == 1, result
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])


def test_a_missing_folder(run: Run, tmp_path: Path) -> None:
    complaint(run("index", tmp_path / "nowhere"), "nowhere", "does not exist")


def test_a_file_as_folder(run: Run, photos: Path) -> None:
    complaint(run("index", photos / "000000519208.jpg"), "is a file")


def test_an_empty_folder_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    complaint(run("index", tmp_path, "--encoder", "bundled"), "no file with an image suffix")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_readable_image(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    complaint(run("index", tmp_path, "--encoder", "bundled", "-q"), "a.jpg", "none of the 1")


def test_one_bad_image_is_named_and_stops_nothing(run: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    (tmp_path / "bad.jpg").write_bytes((photos / "000000160012.jpg").read_bytes()[:4000])
    result = run("index", tmp_path, "--encoder", "bundled", "-q")
    assert result.code == cli.PARTIAL
    assert "1 images" in result.err
    assert "skipped (truncated)" in result.err
    assert "bad.jpg" in run("info", tmp_path, "--skipped").out


def test_the_default_without_a_network_names_the_bundled_encoder(run: Run, photos: Path, tmp_path: Path) -> None:
    complaint(run("index", photos, "--out", tmp_path / "index"), "datacomp_s34b_b86k", "--encoder bundled")
    assert not (tmp_path / "index").exists()


def test_an_unknown_encoder(run: Run, photos: Path, tmp_path: Path) -> None:
    complaint(run("index", photos, "--out", tmp_path / "i", "--encoder", "clip"), "'clip'", "bundled")


def test_another_encoder_than_the_index(run: Run, index_copy: Path, photos: Path, tmp_path: Path) -> None:
    from mmalign import load_encoder

    other = load_encoder("bundled")
    other.settings["temperature"] = 3.0  # type: ignore[attr-defined]
    other.save(tmp_path / "other")
    result = run("index", photos, "--out", index_copy, "--encoder", tmp_path / "other", "-q")
    complaint(result, "'bundled'", str(tmp_path / "other"))


def test_no_index(run: Run, tmp_path: Path) -> None:
    complaint(run("search", tmp_path, "a dog"), str(tmp_path), "mmalign index")
    complaint(run("info", tmp_path / "nowhere"), "does not exist")


def test_missing_words(run: Run, photo_index: Path) -> None:
    complaint(run("search", photo_index), "words")


def test_an_empty_query(run: Run, photo_index: Path) -> None:
    complaint(run("search", photo_index, "  "), "empty")


def test_a_query_image_that_is_none(run: Run, photo_index: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    complaint(run("search", photo_index, tmp_path / "text.jpg"), "text.jpg")


def test_a_filter_that_is_not_understood(run: Run, photo_index: Path) -> None:
    complaint(run("search", photo_index, "a dog", "--where", "wdth > 3"), "wdth", "columns", "width")


def test_more_than_there_is(run: Run, photo_index: Path) -> None:
    assert len(run("search", photo_index, "a dog", "-k", "1000", "-p").out.splitlines()) == 76


@pytest.mark.parametrize("kind", ["vectors", "items", "faiss"])
def test_verify_names_a_damaged_file(run: Run, index_copy: Path, kind: str) -> None:
    victim = max(index_copy.glob(f"{kind}-*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(content)
    result = run("verify", index_copy)
    assert result.code == 1
    assert victim.name in result.out
    assert ("--repair" if kind == "faiss" else "backup") in result.out


def test_repair_rebuilds_faiss(run: Run, index_copy: Path) -> None:
    before = run("search", index_copy, "a dog", "-p").out
    next(index_copy.glob("faiss-*")).unlink()
    complaint(run("search", index_copy, "a dog"), "faiss-", "verify")
    assert run("verify", index_copy, "--repair").code == 0
    assert run("search", index_copy, "a dog", "-p").out == before


def test_repair_refuses_what_only_a_backup_can_restore(run: Run, index_copy: Path) -> None:
    next(index_copy.glob("items-*")).unlink()
    complaint(run("verify", index_copy, "--repair", "-q"), "items-", "backup")


def test_wrong_shards(run: Run, photos: Path, tmp_path: Path) -> None:
    complaint(run("index", photos, "--out", tmp_path / "i", "--shard", "4/4"), "4/4", "0/4")


def test_captions_of_other_files(run: Run, photo_index: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"file": "other.jpg", "caption": "x"}\n')
    complaint(run("eval", "retrieval", photo_index, "--captions", tmp_path / "captions.jsonl"), "other.jpg")
    (tmp_path / "captions.jsonl").write_text("{}\n")
    complaint(run("eval", "retrieval", photo_index, "--captions", tmp_path / "captions.jsonl"), "line 1")


# -- start-up ----------------------------------------------------------------------------------------------------------


RUN_MAIN = "; import mmalign.cli\ntry: mmalign.cli.main()\nexcept SystemExit: pass"


@pytest.mark.parametrize(
    "code",
    [
        "import mmalign, retrieval, generation",
        "import sys; sys.argv = ['mmalign', '--help']" + RUN_MAIN,
        "import sys; sys.argv = ['mmalign', 'index', '--help']" + RUN_MAIN,
    ],
)
def test_nothing_heavy_is_imported_early(code: str) -> None:
    check = "\nimport sys; print(sorted({'torch', 'faiss', 'transformers', 'pyarrow', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help(run: Run) -> None:
    for command in (["index"], ["index", "merge"], ["index", "import"], ["index", "export"], ["search"], ["similar"],
                    ["duplicates"], ["info"], ["verify"], ["encoders"], ["eval", "retrieval"]):  # fmt: skip
        result = run(*command, "--help")
        assert result.code == 0
        assert "Usage" in result.out


# -- found by a stranger -----------------------------------------------------------------------------------------------


def test_a_copied_folder_answers_with_its_own_files(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "000000519208.jpg", tmp_path / "one")
    run("index", tmp_path / "one", "--encoder", "bundled", "-q")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert run("search", tmp_path / "two", "an elephant", "-p").out.strip() == str(tmp_path / "two/000000519208.jpg")
    assert "1 images" in run("index", tmp_path / "two", "-q").err


def test_min_match_without_levels_is_an_error(run: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    run("index", tmp_path, "--encoder", "bundled", "-q")
    complaint(run("search", tmp_path, "a dog", "--min-match", "0.9"), "fewer than 8")


def test_one_caption_a_line_and_a_list_are_the_same(
    run: Run, photo_index: Path, captions: list[dict], tmp_path: Path
) -> None:
    few = captions[:20]
    lines = [json.dumps({"file": row["file"], "caption": text}) for row in few for text in row["captions"]]
    (tmp_path / "flat.jsonl").write_text("\n".join(lines))
    lists = [json.dumps({"file": row["file"], "captions": row["captions"]}) for row in few]
    (tmp_path / "lists.jsonl").write_text("\n".join(lists))
    one, other = (
        json.loads(run("eval", "retrieval", photo_index, "--captions", tmp_path / name, "--json").out)
        for name in ("flat.jsonl", "lists.jsonl")
    )
    assert one == other


def test_a_huge_count_costs_nothing(run: Run, photo_index: Path) -> None:
    assert len(run("search", photo_index, "a dog", "-k", "1000000000", "-p").out.splitlines()) == 76


def test_a_place_is_not_taken_for_words(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    (tmp_path / "sub").mkdir()
    run("index", tmp_path, "--encoder", "bundled", "-q")
    monkeypatch.chdir(tmp_path)
    complaint(run("search", "./sub", "a dog"), "'sub'")
    complaint(run("search", "../nowhere", "a dog"), "nowhere")
    (tmp_path / ".mmalign").rename(tmp_path.parent / f"{tmp_path.name}-index")
    complaint(run("search", "sub", "a dog"), "'sub'")


def test_folder_names_do_not_shadow_words_inside_an_indexed_folder(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    (tmp_path / "merge").mkdir()
    run("index", tmp_path, "--encoder", "bundled", "-q")
    monkeypatch.chdir(tmp_path)
    found = run("search", "merge", "--json")
    assert (found.code, len(found.out.splitlines())) == (0, 1)
    assert "'merge' is taken as words" in found.err
    assert run("search", "text:merge", "--json").out == found.out
    assert "000000519208.jpg" in run("search", "000000519208.jpg", "-p").out
    monkeypatch.chdir(tmp_path / "merge")
    above = run("search", "000000519208.jpg", "-p")
    assert names(above) == ["000000519208.jpg"], "it is looked for in the indexed folder too"
    assert str(tmp_path / ".mmalign") in above.err
    assert run("search", "a very long query " * 30, "-p").out == above.out
    complaint(run("search", "and/or", "a dog"), "text:and/or")
    for command in ("info", "verify"):
        assert run(command).code == 0
    assert run("duplicates").code == cli.NO_RESULT


def test_an_image_that_is_not_there_is_not_searched_as_words(
    run: Run, photo_index: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    complaint(run("search", photo_index, "beach.jpg"), "'beach.jpg' does not exist", "text:beach.jpg")
    complaint(run("search", photo_index, "a dog", "--minus", "trip/beach"), "text:trip/beach")
    assert run("search", photo_index, "text:beach.jpg", "-k", "1").code == 0
    shutil.copy(photos / "000000519208.jpg", "dog")
    assert "text:dog" in run("search", photo_index, "dog", "-k", "1").err
    assert run("search", photo_index, "text:dog", "-k", "1").err == ""
    assert run("search", photo_index, "image:dog", "-k", "1").err == ""


def test_two_forms_of_output_at_once(run: Run, photo_index: Path) -> None:
    complaint(run("search", photo_index, "a dog", "--json", "--paths"), "--json", "--paths")
    complaint(run("similar", photo_index, "0", "--json", "-0"), "--json", "--null")
    complaint(run("duplicates", photo_index, "--json", "-0"), "--json", "--null")


def test_hits_whose_files_are_gone(run: Run, photos: Path, tmp_path: Path) -> None:
    for name in ("000000519208.jpg", "000000160012.jpg"):
        shutil.copy(photos / name, tmp_path)
    run("index", tmp_path, "--encoder", "bundled", "-q")
    (tmp_path / "000000519208.jpg").unlink()
    hits = [json.loads(line) for line in run("search", tmp_path, "an elephant", "--json").out.splitlines()]
    assert {hit["name"]: hit["exists"] for hit in hits} == {"000000519208.jpg": False, "000000160012.jpg": True}
    table = run("search", tmp_path, "an elephant").out.splitlines()
    assert [line.split()[-1] for line in table if "(missing)" in line] == ["(missing)"]
    listed = run("search", tmp_path, "an elephant", "-p")
    assert names(listed) == ["000000160012.jpg"]
    assert "1 left out" in listed.err


def test_an_unfinished_build_says_so(photos: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval import update

    folder = tmp_path / "my pics"
    folder.mkdir()
    for photo in sorted(photos.glob("*.jpg"))[:5]:
        shutil.copy(photo, folder)
    stream = update.encode_stream

    def two(*arguments: Any, **options: Any) -> Any:
        yield next(stream(*arguments, **{**options, "batch_size": 2}))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(update, "encode_stream", two)
        assert run("index", folder, "-e", "bundled", "-q").code == cli.INTERRUPTED
    remedy = f"`mmalign index '{folder}' --encoder bundled`"
    for command in (["search", folder, "a dog"], ["similar", folder, "0"], ["info", folder]):
        told = run(*command).err
        assert "2 of 5 images are indexed so far" in told
        assert remedy in told
    assert json.loads(run("info", folder, "--json").out)["complete"] is False
    assert run("index", folder, "-q").code == 0
    assert run("search", folder, "a dog").err == ""
    assert json.loads(run("info", folder, "--json").out)["complete"] is True


def test_known_skips_and_the_bundled_note_are_told_once(run: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    (tmp_path / "bad.jpg").write_text("no picture")
    first = run("index", tmp_path, "-e", "bundled", "-q")
    assert first.code == cli.PARTIAL
    assert "weak on people" in first.err
    again = run("index", tmp_path, "-q")
    assert again.code == 0
    assert "1 skipped as before" in again.err
    assert "bad.jpg" not in again.err
    assert "weak on people" not in again.err
    (tmp_path / "bad.jpg").write_text("still no picture")
    changed = run("index", tmp_path, "-q")
    assert changed.code == cli.PARTIAL
    assert "bad.jpg" in changed.err


def test_a_remedy_names_the_folder_where_it_is_now(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(photos / "000000519208.jpg", tmp_path / "old")
    run("index", tmp_path / "old", "-e", "bundled", "-q")
    folder = (tmp_path / "old").rename(tmp_path / "it's new")
    next((folder / ".mmalign").glob("items-*")).unlink()
    told = run("search", folder, "a dog").err
    assert f"`{shlex.join(['mmalign', 'verify', str(folder / '.mmalign')])}`" in told
    assert f"`{shlex.join(['mmalign', 'index', str(folder), '--encoder', 'bundled'])}`" in run("verify", folder).out


def test_an_encoder_whose_folder_is_gone(run: Run, photos: Path, tmp_path: Path) -> None:
    from mmalign import load_encoder

    (tmp_path / "pics").mkdir()
    shutil.copy(photos / "000000519208.jpg", tmp_path / "pics")
    load_encoder("bundled").save(tmp_path / "mine")
    assert run("index", tmp_path / "pics", "-e", tmp_path / "mine", "-q").code == 0
    (tmp_path / "mine").rename(tmp_path / "moved")
    complaint(run("search", tmp_path / "pics", "a dog"), str(tmp_path / "mine"), "not there", "--encoder FOLDER")
    assert run("search", tmp_path / "pics", "a dog", "-e", tmp_path / "moved").code == 0


def test_a_query_of_several_lines_can_be_drawn(run: Run, photo_index: Path, tmp_path: Path) -> None:
    assert run("search", photo_index, "a dog\nrunning", "-k", "1", "--grid", tmp_path / "grid.png").code == 0


def test_nested_metadata_goes_into_json(run: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    row = '{"file": "000000519208.jpg", "taken": {"at": "2024-01-01T00:00:00"}, "tags": ["a", "b"]}'
    (tmp_path / "metadata.jsonl").write_text(row + "\n")
    run("index", tmp_path, "--encoder", "bundled", "-q")
    metadata = json.loads(run("search", tmp_path, "a dog", "--json").out)["metadata"]
    assert metadata["taken"]["at"].startswith("2024-01-01")
    assert metadata["tags"] == ["a", "b"]
    assert run("index", "export", tmp_path, "--out", tmp_path / "out").code == 0


def test_interrupting_says_what_is_kept(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval.update.encode_stream", stop)
    done = run("index", photos, "--out", tmp_path / "i", "-e", "bundled", "-q")
    assert done.code == cli.INTERRUPTED
    assert "stopped" in done.err


def test_the_record_of_an_update_and_of_a_check_as_json(run: Run, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "000000519208.jpg", tmp_path)
    (tmp_path / "bad.jpg").write_text("no picture")
    done = run("index", tmp_path, "-e", "bundled", "-q", "--json")
    report = json.loads(done.out)
    assert done.code == cli.PARTIAL
    assert (report["images"], report["added"], report["skipped"][0]["reason"]) == (1, 1, "not_an_image")
    assert report["index"] == str(tmp_path / ".mmalign")
    assert json.loads(run("verify", tmp_path, "--json", "-q").out) == {"repaired": [], "problems": []}
    victim = next((tmp_path / ".mmalign").glob("faiss-*"))
    victim.unlink()
    found = run("verify", tmp_path, "--json", "-q")
    (problem,) = json.loads(found.out)["problems"]
    assert (found.code, problem["file"], problem["problem"]) == (1, victim.name, "is missing")
    assert "--repair" in problem["remedy"]
    mended = run("verify", tmp_path, "--repair", "--json", "-q")
    assert (mended.code, json.loads(mended.out)["problems"]) == (0, [])


def test_parts_come_first_and_the_new_index_after_out(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for photo in sorted(photos.glob("*.jpg"))[:4]:
        shutil.copy(photo, tmp_path / "pics")
    for part in range(2):
        run("index", tmp_path / "pics", "-o", tmp_path / f"part{part}", "-e", "bundled", "-q", "--shard", f"{part}/2")
    done = run("index", "merge", tmp_path / "part0", tmp_path / "part1", "-o", tmp_path / "whole", "-q")
    assert (done.code, done.err) == (0, f"4 images in {tmp_path / 'whole'}\n")
    assert run("index", "merge", tmp_path / "part0").code == 2
    assert run("index", "export", tmp_path / "whole", "-o", tmp_path / "npy", "-q").code == 0
    taken = run("index", "import", tmp_path / "npy", "-o", tmp_path / "again", "-e", "bundled", "-q")
    assert taken.code == 0
    assert len(run("search", tmp_path / "again", "a dog", "-p").out.splitlines()) == 4


def test_a_moved_encoder_and_a_lowest_cosine(run: Run, photo_index: Path, tmp_path: Path) -> None:
    from mmalign import load_encoder

    load_encoder("bundled").save(tmp_path / "mine")
    plain = run("search", photo_index, "a cat", "-k", "5", "--json").out
    assert run("search", photo_index, "a cat", "-k", "5", "--json", "-e", tmp_path / "mine").out == plain
    level = json.loads(plain.splitlines()[2])["score"] - 1e-5
    kept = run("search", photo_index, "a cat", "-k", "5", "-p", "--min-score", str(level))
    assert len(kept.out.splitlines()) == 3
    number = str(json.loads(plain.splitlines()[0])["id"])
    assert run("similar", photo_index, number, "--min-score", "0.999", "-p").code == cli.NO_RESULT


def test_an_index_type_of_ones_own(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    from retrieval import index_types, register_index_type

    monkeypatch.setattr(index_types, "_REGISTERED", {})
    register_index_type("own", lambda dim, rows: faiss.IndexHNSWFlat(dim, 8, faiss.METRIC_INNER_PRODUCT))
    (tmp_path / "pics").mkdir()
    for photo in sorted(photos.glob("*.jpg"))[:10]:
        shutil.copy(photo, tmp_path / "pics")
    assert run("index", tmp_path / "pics", "-o", tmp_path / "i", "-e", "bundled", "-q", "--factory", "own").code == 0
    assert "own over 10 vectors" in run("info", tmp_path / "i").out
