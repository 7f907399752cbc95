"""The emoji builder, on tiny archives made here: no npm, no network."""

import io
import json
import tarfile

import pytest
from PIL import Image

from vgen.data.dataset import open_images
from vgen.data.emoji import build_emoji, held_out
from vgen.data.emoji_captions import captions_of
from vgen.data.npm import Package, fetch_archive
from vgen.data.shards import write_shard
from vgen.errors import VgenError
from vgen.files import sha256

PICTURES, NAMES = Package("@scope/pictures", "1.0.0"), Package("names", "2.0.0")


def entry(unified, name, subcategory="face", short_name=None, category="Smileys"):
    short_name = short_name or name.lower().replace(" ", "_")
    return {
        "unified": unified,
        "name": name,
        "short_name": short_name,
        "subcategory": subcategory,
        "category": category,
        "skin_variations": {"1F3FB": {"unified": f"{unified}-1F3FB"}},
    }


ENTRIES = [
    *(entry(f"1F6{number:02X}", f"FACE NUMBER {number}") for number in range(40)),
    entry("2764-FE0F", "HEAVY BLACK HEART", "heart"),
    entry("1F1EB-1F1F7", "France Flag", "country-flag"),
    entry("1F935", "MAN IN TUXEDO", "person-role", "person_in_tuxedo"),
    entry("1F935-200D-2642-FE0F", "MAN IN TUXEDO", "person-role", "man_in_tuxedo"),
    entry("1F000", "NO SUCH PICTURE"),
]


def webp(color, size=32):
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste(color, (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write_tgz(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))


def make_archives(folder, entries=ENTRIES, replace=None):
    folder.mkdir(exist_ok=True)
    assets = {
        f"assets/{item['unified'].lower()}.webp": webp((200, number * 5, 0)) for number, item in enumerate(entries[:-1])
    }
    assets["assets/2764.webp"] = assets.pop("assets/2764-fe0f.webp")  # a file that lacks the presentation selector
    assets["assets/1f600-1f3fb.webp"] = webp("blue")  # a skin tone: no entry of its own
    write_tgz(folder / PICTURES.file_name, assets | (replace or {}))
    write_tgz(folder / NAMES.file_name, {"emoji.json": json.dumps(entries).encode(), "package.json": b"{}"})
    return folder


def build(out, archives, **options):
    return build_emoji(
        out, archives=archives, packages=(PICTURES, NAMES), progress=False, **{"size": 16, "shard_size": 10} | options
    )


@pytest.fixture
def archives(tmp_path):
    return make_archives(tmp_path / "archives")


@pytest.fixture(autouse=True)
def fake_npm(tmp_path, monkeypatch):
    """An npm that copies from the archives folder and counts its calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "npm"
    script.write_text(
        f'#!/bin/sh\necho call >> {tmp_path}/calls\nfor last; do :; done\ncase "$2" in\n'
        f'  @scope/pictures@1.0.0) cp {tmp_path}/archives/{PICTURES.file_name} "$last";;\n'
        f'  names@2.0.0) cp {tmp_path}/archives/{NAMES.file_name} "$last";;\n'
        "  *) echo no such package >&2; exit 1;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")


def calls(tmp_path):
    return len((tmp_path / "calls").read_text().split())


def test_join_counts_split_and_contents(tmp_path, archives):
    manifest = build(tmp_path / "out", archives)
    counts = manifest["counts"]
    assert manifest["complete"] and manifest["classes"] == ["country-flag", "face", "heart", "person-role"]
    assert (counts["pictures"], counts["names"], counts["captions"]) == (44, 43, 44)
    assert (counts["names_without_picture"], counts["pictures_without_name"]) == (1, 1)
    wanted = {item["unified"]: held_out(item["unified"]) for item in ENTRIES[:-1]}
    assert counts["heldout"] == sum(wanted.values()) and counts["train"] + counts["heldout"] == 44
    seen = {}
    for split in ("train", "heldout"):
        for item in open_images(tmp_path / "out", split, size=16):
            seen[item["key"].upper()] = split == "heldout"
            assert item["image"][:, 0, 0].tolist() == [1, 1, 1]  # composited on white
            assert item["image"][2, 8, 8] == -1
    assert seen == {("2764" if key == "2764-FE0F" else key): value for key, value in wanted.items()}
    record = json.loads(read_member(tmp_path / "out", "2764.json"))
    assert record["caption"] == "red heart" and record["codepoint"] == "2764-FE0F" and record["label"] == 2
    assert (
        read_member(tmp_path / "out", "2764.txt") == b"red heart" and read_member(tmp_path / "out", "2764.cls") == b"2"
    )
    for file, shard in manifest["shards"].items():
        assert sha256(tmp_path / "out" / file) == shard["sha256"]


def read_member(out, name):
    for shard in out.glob("*.tar"):
        with tarfile.open(shard) as archive:
            if name in archive.getnames():
                return archive.extractfile(name).read()
    raise KeyError(name)


def test_split_does_not_depend_on_what_else_is_there():
    assert held_out("1F600") == held_out("1f600")
    share = sum(held_out(f"{number:X}") for number in range(5000)) / 5000
    assert 0.08 < share < 0.12
    # Pinned: a changed hash would move pictures that a shipped model was trained on into the held-out set.
    assert [f"{number:X}" for number in range(0x1F600, 0x1F620) if held_out(f"{number:X}")] == [
        "1F603",
        "1F617",
        "1F618",
        "1F619",
    ]


def test_rebuild_is_byte_identical_and_complete_data_needs_no_archives(tmp_path, archives):
    first = build(tmp_path / "a", archives)
    assert build(tmp_path / "b", archives)["shards"] == first["shards"]
    assert build(tmp_path / "a", tmp_path / "nowhere") == first


def test_resume_keeps_intact_shards_and_replaces_the_rest(tmp_path, archives):
    out = tmp_path / "out"
    whole = build(out, archives)
    files = list(whole["shards"])
    kept = (out / files[0]).stat().st_mtime_ns
    (out / files[1]).unlink()
    (out / files[2]).write_bytes(b"broken")
    (out / "manifest.json").write_text(
        json.dumps({**whole, "complete": False, "shards": {name: whole["shards"][name] for name in files[:3]}})
    )
    with pytest.raises(VgenError, match="not finished"):
        open_images(out)
    assert build(out, archives) == whole
    assert (out / files[0]).stat().st_mtime_ns == kept
    smaller = build(out, archives, shard_size=30)  # other settings: other shards, none of the old ones left
    assert {path.name for path in out.glob("*.tar")} == smaller["shards"].keys() != whole["shards"].keys()


def test_files_of_others_are_neither_removed_nor_written_over(tmp_path, archives):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("photos.tar", "train-00000.tar"):
        (out / name).write_bytes(b"mine")
        with pytest.raises(VgenError, match=rf"{name} is there already and belongs to no emoji dataset"):
            build(out, archives)
        assert [path.read_bytes() for path in out.iterdir()] == [b"mine"]
        (out / name).unlink()
    (out / "manifest.json").write_text('{"kind": "scans", "shards": {}, "complete": true}')
    with pytest.raises(VgenError, match="not the manifest of an emoji dataset"):
        build(out, archives)
    (out / "manifest.json").unlink()
    (out / "notes.txt").write_text("mine")
    whole = build(out, archives)
    (out / "holiday.tar").write_bytes(b"mine")  # came later: other settings would rebuild, and must not take it along
    with pytest.raises(VgenError, match=r"holiday\.tar is there already"):
        build(out, archives, shard_size=30)
    assert (out / "holiday.tar").read_bytes() == b"mine" and (out / "notes.txt").read_text() == "mine"
    assert all(sha256(out / file) == shard["sha256"] for file, shard in whole["shards"].items())


def test_a_killed_build_knows_the_shards_it_had_begun(tmp_path, archives, monkeypatch):
    out = tmp_path / "out"

    def die(*args):
        write_shard(*args)
        raise KeyboardInterrupt  # behind the shard, before the manifest names it

    monkeypatch.setattr("vgen.data.emoji.write_shard", die)
    with pytest.raises(KeyboardInterrupt):
        build(out, archives, shard_size=30)
    monkeypatch.undo()
    assert len(list(out.glob("*.tar"))) == 1
    whole = build(out, archives)
    assert {path.name for path in out.glob("*.tar")} == whole["shards"].keys() and "files" not in whole


def test_broken_or_missing_archives_are_one_clear_error(tmp_path, archives):
    path = archives / PICTURES.file_name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VgenError, match=r"scope-pictures-1\.0\.0\.tgz is broken"):
        build(tmp_path / "out", archives)
    path.unlink()
    with pytest.raises(VgenError, match=r"npm pack @scope/pictures@1\.0\.0"):
        build(tmp_path / "out", archives)
    make_archives(archives, replace={"assets/1f600.webp": b"no webp"})
    with pytest.raises(VgenError, match="1f600"):
        build(tmp_path / "out", archives)
    with pytest.raises(VgenError, match="not finished"):
        open_images(tmp_path / "out")


def test_npm_fetches_once_and_again_when_the_cache_is_broken(tmp_path, archives):
    out = tmp_path / "out"
    manifest = build(out, None)
    assert manifest["complete"] and calls(tmp_path) == 2
    unfinished = json.dumps({**manifest, "complete": False, "shards": {}})
    (out / "manifest.json").write_text(unfinished)
    assert build(out, None) == manifest and calls(tmp_path) == 2
    (out / "manifest.json").write_text(unfinished)
    (out / "archives" / NAMES.file_name).write_bytes(b"half")
    assert build(out, None) == manifest and calls(tmp_path) == 3


def test_npm_trouble_is_one_clear_error(tmp_path, archives, monkeypatch):
    with pytest.raises(VgenError, match="SHA-256"):
        fetch_archive(Package("names", "2.0.0", digest="0" * 64), tmp_path / "cache")
    with pytest.raises(VgenError, match="no such package"):
        fetch_archive(Package("unknown", "1.0.0"), tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VgenError, match=r"npm is needed.*--archives"):
        fetch_archive(NAMES, tmp_path / "cache")


def test_captions_are_what_one_would_type():
    cases = {
        ("GRINNING FACE", "face-smiling"): "grinning face",
        ("RED APPLE", "food-fruit"): "red apple",
        ("France Flag", "country-flag"): "flag of france",
        ("United States Flag", "country-flag"): "flag of the united states",
        ("Côte d’Ivoire Flag", "country-flag"): "flag of cote d'ivoire",
        ("Congo - Kinshasa Flag", "country-flag"): "flag of congo kinshasa",
        ("HEAVY BLACK HEART", "heart"): "red heart",
        ("WOMAN: RED HAIR", "person"): "woman with red hair",
        ("MAN: BALD", "person"): "bald man",
        ("FAMILY: MAN, WOMAN, GIRL", "family"): "family with man woman girl",
        ("CLOCK FACE TWO OCLOCK", "time"): "clock face two o'clock",
        ("THUMBS UP SIGN", "hand-fingers-closed"): "thumbs up",
        ("LARGE GREEN CIRCLE", "geometric"): "green circle",
        ("WOMANS HAT", "clothing"): "woman's hat",
        ("T-REX", "animal-reptile"): "t-rex",
    }
    captions = captions_of([entry("0", name, subcategory) for name, subcategory in cases])
    assert captions == list(cases.values())


def test_captions_stay_distinct():
    shared = [
        entry("1", "SUN", "sky"),
        entry("2", "BLACK SUN WITH RAYS", "sky"),
        entry("3", "MAN IN TUXEDO", "x", "person_in_tuxedo"),
    ]
    assert captions_of(shared) == ["sun", "black sun with rays", "man in tuxedo"]
    assert captions_of([*shared[2:], entry("4", "MAN IN TUXEDO", "x")]) == ["person in tuxedo", "man in tuxedo"]


@pytest.mark.parametrize("options", [{"size": 4}, {"size": 512}, {"shard_size": 0}])
def test_bad_settings(tmp_path, options):
    with pytest.raises(VgenError, match="found"):
        build_emoji(tmp_path, **options)
