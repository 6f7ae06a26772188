from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import tarfile
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.listing import Listing, sample_keys
from pipeline.sources import FolderSource, TarSource, open_source
from pipeline.store import Store
from pipeline.tar_members import tar_members


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def make_tar(path: Path, *names: str, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def rows(listing: Listing) -> list[tuple[str, str, int, int]]:
    return [(ref.key, ref.path, ref.num_bytes, ref.label) for ref in listing.refs]


def test_an_image_folder_has_classes(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "b/0.PNG", "a/deep/er/2.webp", "a/notes.txt", "README", "empty/x.csv")
    listing = FolderSource(str(tmp_path)).scan()
    assert rows(listing) == [
        ("a/deep/er/2", "a/deep/er/2.webp", 16, 0),
        ("b/0", "b/0.PNG", 7, 1),
        ("b/1", "b/1.jpg", 7, 1),
    ]
    assert listing.classes == ("a", "b")
    assert listing.num_ignored_files == 3


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "0.jpeg", "folder/labels.csv")
    listing = FolderSource(str(tmp_path)).scan()
    assert rows(listing) == [("0", "0.jpeg", 6, -1), ("1", "1.jpg", 5, -1)]
    assert listing.classes is None
    assert listing.num_ignored_files == 1


def test_a_folder_that_is_both_names_one_of_each(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "zero.jpg")
    with pytest.raises(SourceError, match=r"top \(zero\.jpg\) and in folders \(cat/1\.jpg\).*move"):
        FolderSource(str(tmp_path)).scan()


def test_a_folder_around_the_class_folders_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "data/train/a/1.jpg", "data/train/b/1.jpg")
    listing = FolderSource(str(tmp_path)).scan()
    assert listing.classes == ("a", "b")
    assert [ref.key for ref in listing.refs] == ["a/1", "b/1"]
    one_class = FolderSource(str(touch(tmp_path / "other", "cat/1.jpg", "cat/2.jpg"))).scan()
    assert one_class.classes == ("cat",)


def test_nothing_to_read_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no images \(0 other files\); give a folder"):
        open_source(str(tmp_path)).scan()
    touch(tmp_path, "a.txt")
    with pytest.raises(SourceError, match=r"holds no images \(1 other files\)"):
        open_source(str(tmp_path)).scan()
    with pytest.raises(SourceError, match="does not exist; give"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"is a file, not a folder and not a \.tar or \.parquet"):
        open_source(str(tmp_path / "a.txt"))
    with pytest.raises(SourceError, match="compressed tar"):
        open_source(str(tmp_path / "a.tar.gz"))
    with pytest.raises(SourceError, match="holds no images"):
        open_source(str(make_tar(tmp_path / "none.tar", "a.txt"))).scan()


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", ".cache/2.jpg", "a/.jpg")
    listing = FolderSource(str(tmp_path)).scan()
    assert [ref.path for ref in listing.refs] == ["a/1.jpg"]
    assert TarSource(str(make_tar(tmp_path / "x.tar", "a/1.jpg", "__x/._1.jpg"))).scan().num_ignored_files == 1


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "real", "1.jpg")
    source = tmp_path / "source"
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "real")
    (source / "a").mkdir()
    (source / "a" / "file.jpg").symlink_to(tmp_path / "real" / "1.jpg")
    (source / "a" / "up").symlink_to(source)
    (source / "a" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(source / "a" / "pipe.jpg")
    folder = FolderSource(str(source))
    listing = folder.scan()
    assert rows(listing) == [
        ("a/broken", "a/broken.jpg", 0, 0),
        ("a/file", "a/file.jpg", 5, 0),
        ("linked/1", "linked/1.jpg", 5, 1),
    ]
    assert listing.num_ignored_files == 1
    assert folder.read(listing.refs[2]) == b"1.jpg"
    with pytest.raises(FileNotFoundError):
        folder.read(listing.refs[0])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_as_the_folder_it_was_made_of(tmp_path: Path, format: int) -> None:
    names = ["b/1.jpg", "ä/" + "long" * 20 + ".jpg", "b/10.JPEG", "b/notes.txt"]
    folder = touch(tmp_path / "folder", *names)
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        tar.add(folder, ".")
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "x.tar"))))
    listing = source.scan()
    assert rows(listing) == rows(FolderSource(str(folder)).scan())
    assert listing.classes == ("b", "ä")
    assert listing.num_ignored_files == 1
    for ref in listing.refs:
        assert source.read(ref) == ref.path.encode()


def test_members_are_read_at_their_offsets(tmp_path: Path) -> None:
    # More bytes than one block of read-ahead, so that headers lie in, across and beyond it.
    contents = {f"{number:04d}.png": bytes([number % 251]) * (number * 37 + 1) for number in range(200)}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = TarSource(str(tmp_path / "x.tar"))
    listing = source.scan()
    assert listing.classes is None
    assert {ref.path: source.read(ref) for ref in listing.refs} == contents


def odd_header(name: bytes, size: bytes, kind: bytes = b"0", signed: bool = False, prefix: bytes = b"") -> bytes:
    """A header that other programs may write."""
    header = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    header[:100], header[124:136], header[156:157] = name.ljust(100, b"\0"), size, kind
    header[345:500] = prefix.ljust(155, b"\0")
    header[148:156] = b" " * 8
    checksum = sum(byte - 256 if signed and byte > 127 else byte for byte in header)
    header[148:156] = b"%06o\0 " % checksum
    return bytes(header)


def test_headers_as_few_programs_write_them_are_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    size, content = b"00000000003\0", b"abc".ljust(512, b"\0")
    members = [
        odd_header(b"plain.jpg", size) + content,
        odd_header(b"a number with spaces.jpg", b"         3 \0") + content,
        odd_header(b"a short number.jpg", b"3\0".ljust(12, b"\0")) + content,
        odd_header(b"a binary number.jpg", b"\x80" + bytes(10) + b"\3") + content,
        odd_header("bytes with signs ä.jpg".encode(), size, signed=True) + content,
        odd_header("bytes without ä.jpg".encode(), size) + content,
        odd_header(b"not UTF-8 \xff.jpg", size) + content,
        odd_header(b"before POSIX.jpg", size, kind=b"\0") + content,
        odd_header(b"contiguous.jpg", size, kind=b"7") + content,
        odd_header(b"a folder before POSIX/", b"00000000000\0", kind=b"\0"),
        odd_header(b"the second half.jpg", size, prefix=b"the first half") + content,
        odd_header(b"n" * 96 + b".jpg", size) + content,
        odd_header(b"empty.jpg", b"00000000000\0"),
        odd_header(b"last.jpg", size) + content,
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(members) + bytes(1024))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.size, m.offset_data) for m in tar.getmembers() if m.isfile()]
    assert len(expected) == len(members) - 1
    found = list(tar_members(Store(str(tmp_path)), "x.tar", 2**16))
    assert sorted((file.path, file.num_bytes, file.offset) for file in found) == sorted(expected)


def test_a_size_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    first = odd_header(b"a.jpg", b"00000000003\0") + b"abc".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(first + odd_header(b"b.jpg", b"00000000009\0") + bytes(2048))
    with pytest.raises(SourceError, match="after 1 files"):
        TarSource(str(tmp_path / "x.tar")).scan()


def test_a_tar_keeps_what_unpacking_it_would(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in (b"old", b"newer"):
            member = tarfile.TarInfo("a.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    source = TarSource(str(tmp_path / "x.tar"))
    assert {ref.path: source.read(ref) for ref in source.scan().refs} == dict.fromkeys(
        ("a.jpg", "b.jpg", "c.jpg"), b"newer"
    )


def test_links_in_a_tar_are_followed_as_in_the_folder_it_was_made_of(tmp_path: Path) -> None:
    folder = touch(tmp_path / "folder", "a/1.jpg", "b/2.jpg", "b/deep/3.jpg", "b/.hidden/4.jpg", "c/5.txt")
    os.link(folder / "a/1.jpg", folder / "b/hard.jpg")
    (folder / "a/soft.jpg").symlink_to("../b/deep/./3.jpg")
    os.link(folder / "a/soft.jpg", folder / "b/hard-to-soft.jpg", follow_symlinks=False)
    (folder / "a/twice.jpg").symlink_to("soft.jpg")
    (folder / "d").symlink_to("b")
    (folder / "a/up").symlink_to("..")
    (folder / "a/through.jpg").symlink_to("up/d/2.jpg")
    (folder / "a/gone.jpg").symlink_to("gone")
    (folder / "a/round.jpg").symlink_to("round.jpg")
    os.mkfifo(folder / "a/pipe.jpg")
    tar = tmp_path / "x.tar"
    subprocess.run(["tar", "-C", folder, "-cf", tar, "."], check=True)
    from_folder, from_tar = FolderSource(str(folder)), TarSource(str(tar))
    expected, listing = from_folder.scan(), from_tar.scan()
    assert "d/deep/3.jpg" in [ref.path for ref in listing.refs]
    assert rows(listing) == rows(expected)
    assert (listing.classes, listing.ignored_extensions) == (expected.classes, expected.ignored_extensions)
    assert listing.ignored_extensions == {"(special)": 1, "txt": 1}
    for ref, wanted in zip(listing.refs, expected.refs, strict=True):
        if wanted.path.endswith(("gone.jpg", "round.jpg")):
            for source, bad in ((from_tar, ref), (from_folder, wanted)):
                with pytest.raises(OSError, match="link"):
                    source.read(bad)
        else:
            assert from_tar.read(ref) == from_folder.read(wanted)


@pytest.mark.parametrize("target", ["/etc/hostname", "../x.jpg", "a/../../x.jpg", "a.jpg/x", "nothing"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_that_leads_out_of_the_tar_or_nowhere_is_listed_and_cannot_be_read(
    tmp_path: Path, target: str, kind: bytes
) -> None:
    path = make_tar(tmp_path / "x.tar", "a.jpg")
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = kind, target
        tar.addfile(link)
    source = TarSource(str(path))
    good, bad = source.scan().refs
    assert source.read(good) == b"a.jpg"
    with pytest.raises(FileNotFoundError, match="link to a file that is not in the tar"):
        source.read(bad)


def test_a_sparse_image_is_listed_and_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with (tmp_path / "folder" / "a.jpg").open("wb") as file:
        file.truncate(2**20)
    subprocess.run(["tar", "-C", tmp_path / "folder", "--sparse", "-cf", tmp_path / "x.tar", "."], check=True)
    source = TarSource(str(tmp_path / "x.tar"))
    with pytest.raises(OSError, match="stored sparse"):
        source.read(source.scan().refs[0])


def test_images_beside_tars_are_unclear(tmp_path: Path) -> None:
    make_tar(touch(tmp_path, "a/1.jpg") / "x.tar", "b/2.jpg")
    with pytest.raises(SourceError, match=r"both images \(a/1\.jpg\) and tars \(x\.tar\).*move"):
        FolderSource(str(tmp_path)).scan()


def test_ignored_files_are_counted_by_extension(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/2.xml", "a/3.XML", "README", ".git", "a/._1.jpg")
    listing = FolderSource(str(tmp_path)).scan()
    assert listing.ignored_extensions == {"xml": 2, "(none)": 1, "(hidden)": 2}
    assert listing.num_ignored_files == 5
    touch(tmp_path, *[f"frames/x.{number:03d}" for number in range(100)])
    listing = FolderSource(str(tmp_path)).scan()
    assert len(listing.ignored_extensions) == 21
    assert listing.ignored_extensions["(other)"] == 83
    assert listing.num_ignored_files == 105


@pytest.mark.parametrize("cut", [700, 1200])
def test_a_truncated_tar_is_an_error(tmp_path: Path, cut: int) -> None:
    path = make_tar(tmp_path / "x.tar", "a.jpg", "b" * 600 + ".jpg", format=tarfile.GNU_FORMAT)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SourceError, match="not a whole uncompressed tar"):
        TarSource(str(path)).scan()


def test_a_damaged_header_is_an_error_not_an_early_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", "a.jpg", "b.jpg", "c.jpg")
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"bad header, after 1 files"):
        TarSource(str(path)).scan()
    path.write_bytes(b"this is no tar" * 100)
    with pytest.raises(SourceError, match="not a whole uncompressed tar"):
        TarSource(str(path)).scan()


def test_folders_and_tars_in_buckets(tmp_path: Path) -> None:
    names = ("a/1.jpg", "b/2.png", "b/x.txt")
    folder = touch(tmp_path / "folder", *names)
    bucket = Store("memory://test-sources/data")
    for name in names:
        bucket.write(name, (folder / name).read_bytes())
    Store("memory://test-sources").write("all.tar", make_tar(tmp_path / "all.tar", *names).read_bytes())
    expected = rows(FolderSource(str(folder)).scan())
    tar = open_source("memory://test-sources/all.tar")
    assert rows(tar.scan()) == expected
    assert tar.read(tar.scan().refs[1]) == b"b/2.png"
    remote = open_source("memory://test-sources/data")
    assert rows(remote.scan()) == expected
    assert remote.read(remote.scan().refs[1]) == b"b/2.png"


def test_keys_of_files_that_differ_in_their_extension_only() -> None:
    assert sample_keys(["a.jpeg", "a.jpg", "a.png", "a.png.jpg", "a=png.jpg"]) == [
        "a",
        "a=jpg",
        "a=png",
        "a%2Epng",
        "a%3Dpng",
    ]


PATHS = st.builds(
    lambda folders, stem, extension: "/".join([*folders, stem]) + extension,
    st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1), max_size=2),
    st.text(st.sampled_from("aA.=%é \udc80-"), min_size=1, max_size=80).filter(lambda stem: stem.strip(".")),
    st.sampled_from([".jpg", ".JPG", ".png", ".jpeg"]),
)


@given(st.lists(PATHS, unique=True, max_size=30).map(sorted))
def test_keys_are_safe_unique_and_say_the_path(paths: list[str]) -> None:
    try:
        for path in paths:
            os.fsencode(path)
    except UnicodeEncodeError:  # no file system gives such a name
        return
    keys = sample_keys(paths)
    assert len(set(keys)) == len(paths)
    for key, path in zip(keys, paths, strict=True):
        assert re.fullmatch(r"[A-Za-z0-9_%=/-]{1,90}", key)
        if "=" not in key:
            assert unquote(key, errors="surrogateescape") == os.path.splitext(path)[0]
