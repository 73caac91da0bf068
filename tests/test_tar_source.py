import gzip
import io
import tarfile

import numpy as np
import pytest

from terdit_jax.data import tar_source
from terdit_jax.data.image_file import ImageError
from terdit_jax.data.sources import make_folder_source
from terdit_jax.data.tar_source import Stretch, make_tar_source
from terdit_jax.errors import UserError
from tests.image_files import all_items, assert_threads_load_what_one_does, image_bytes, tar_bytes


def make_classes(counts, first_seed=0):
    """{class: {file: content}} like ImageNet's."""
    names = {name: [f"{name}_{index}.JPEG" for index in range(count)] for name, count in counts.items()}
    return {name: {file: image_bytes(first_seed + i) for i, file in enumerate(files)} for name, files in names.items()}


def write_archive(path, classes, **options):
    path.write_bytes(
        tar_bytes({f"{name}.tar": tar_bytes(files, **options) for name, files in classes.items()}, **options)
    )
    return path


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_archive_folder_of_archives_and_folder_of_folders_agree(tmp_path, tar_format):
    classes = make_classes({"n02": 12, "n01": 9, "n10": 10})
    archive = write_archive(tmp_path / "train.tar", classes, tar_format=tar_format)
    for name, files in classes.items():
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / "tars" / f"{name}.tar").write_bytes(tar_bytes(files, tar_format))
        (tmp_path / "folders" / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / "folders" / name / file).write_bytes(content)
    options = {"image_size": 8, "heldout_share": 0.2}
    whole = make_tar_source(archive, **options)
    apart = make_tar_source(tmp_path / "tars", **options)
    plain = make_folder_source(tmp_path / "folders", **options)
    assert whole.class_names == apart.class_names == plain.class_names == ("n01", "n02", "n10")
    assert whole.splits == apart.splits == plain.splits
    assert whole.description == apart.description == plain.description | {"kind": "tar"}
    assert_threads_load_what_one_does(whole)
    for item in all_items(whole):
        expected, label = plain.load(item)
        for source in (whole, apart):
            pixels, found = source.load(item)
            np.testing.assert_array_equal(pixels, expected)
            assert found == label == item.label
            assert pixels.dtype == np.uint8 and pixels.shape == source.shape == (8, 8, 3)


def test_imagenet_holds_out_a_hundredth(tmp_path):
    source = make_tar_source(write_archive(tmp_path / "t.tar", make_classes({"a": 150, "b": 150})), image_size=8)
    assert [len(source.splits[split]) for split in ("train", "heldout")] == [297, 3]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, tar_format):
    """Long names, names of other scripts, odd sizes, empty files and everything that is no file, against tarfile."""
    rng = np.random.default_rng(0)
    members = {f"{index:03d}.JPEG": rng.bytes(size) for index, size in enumerate((0, 1, 511, 512, 513, 1024, 5000))}
    members["folder/" * 16 + "long.JPEG"] = rng.bytes(700)
    if tar_format != tarfile.USTAR_FORMAT:
        members["x" * 300 + ".JPEG"] = rng.bytes(600)
        members["猫.JPEG"] = rng.bytes(10)
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        entry = tarfile.TarInfo(f"special-{kind.decode()}")
        entry.type, entry.linkname = kind, "000.JPEG" if tar_format == tarfile.USTAR_FORMAT else "y" * 200
        members[entry.name] = entry
    members["last.JPEG"] = b"last"
    path = tmp_path / "a.tar"
    path.write_bytes(b"before" * 100 + tar_bytes(members, tar_format) + b"after")
    stretch = Stretch(path, 600, path.stat().st_size - 5)
    found = list(tar_source.list_members(stretch))
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes()[600:-5])) as tar:
        expected = [(entry.name, 600 + entry.offset_data, entry.size) for entry in tar if entry.isreg()]
    assert [(name, place.start, place.end - place.start) for name, place in found] == expected
    assert len(expected) == sum(isinstance(content, bytes) for content in members.values())


def test_what_is_ignored_is_named(tmp_path):
    link, hard, folder = (tarfile.TarInfo(name) for name in ("a/link.JPEG", "a/hard.JPEG", "a"))
    folder.type = tarfile.DIRTYPE
    link.type, hard.type, link.linkname, hard.linkname = tarfile.SYMTYPE, tarfile.LNKTYPE, "0.JPEG", "0.JPEG"
    files = {f"{index}.JPEG": image_bytes(index) for index in range(10)}
    plain = {f"./{name}": content for name, content in files.items()}
    inner = tar_bytes(
        {"0": folder, **plain, "1": link, "2": hard, ".draft.JPEG": b"?", "._0.JPEG": b"?", "__MACOSX/0.JPEG": b"?"}
    )
    outer = {
        "README": b"?",
        "tars/a.tar": inner,
        "N02.TAR": inner,
        ".old.tar": inner,
        "._a.tar": b"?",
        "x/notes.txt": b"?",
    }
    (tmp_path / "t.tar").write_bytes(tar_bytes(outer))
    (tmp_path / "tars").mkdir()
    for name, content in outer.items():
        (tmp_path / "tars" / name.rpartition("/")[2]).write_bytes(content)
    in_class = {"link.JPEG": "a link", "hard.JPEG": "a link"}
    expected = {f"{c}.tar/a/{name}": why for c in ("a", "N02") for name, why in in_class.items()}
    expected |= {f"{c}.tar/.draft.JPEG": "hidden" for c in ("a", "N02")} | {".old.tar": "hidden", "README": "no .tar"}
    for place, notes in ((tmp_path / "t.tar", "x/notes.txt"), (tmp_path / "tars", "notes.txt")):
        source = make_tar_source(place, image_size=8, heldout_share=0.1)
        assert source.class_names == ("N02", "a")
        names = {item.source_id for item in all_items(source)}
        assert names == {f"{c}/{file}" for c in source.class_names for file in files}
        assert source.ignored == expected | {notes: "no .tar"}


@pytest.mark.parametrize(
    "name, message",
    [
        ("n03/0.JPEG", "lies beside class archives: pack each class"),
        ("0.webp", "lies beside class archives: pack each class"),
        ("n03.tar.gz", "is no plain .tar as the other classes are"),
        ("n03.TGZ", "is no plain .tar as the other classes are"),
        ("n03.zip", "is no plain .tar as the other classes are"),
        ("a.TAR", "holds two archives"),
    ],
)
def test_a_class_of_another_shape_is_refused_and_not_dropped(tmp_path, name, message):
    images = tar_bytes({f"{index}.JPEG": image_bytes(index) for index in range(10)})
    members = {"a.tar": images, "n02.TAR": images, name: images}
    (tmp_path / "t.tar").write_bytes(tar_bytes(members))
    assert message in refusal(tmp_path / "t.tar")
    for member, content in members.items():
        (tmp_path / "tars" / member).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tars" / member).write_bytes(content)
    assert (message if "/" not in name else "n03/ lies beside") in refusal(tmp_path / "tars")


def test_links_to_class_archives_are_followed_or_refused(tmp_path):
    images = tar_bytes({f"{index}.JPEG": image_bytes(index) for index in range(10)})
    link = tarfile.TarInfo("b.tar")
    link.type, link.linkname = tarfile.SYMTYPE, "a.tar"
    (tmp_path / "t.tar").write_bytes(tar_bytes({"a.tar": images, "b.tar": link}))
    assert "b.tar is no plain .tar" in refusal(tmp_path / "t.tar")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(images)
    (tmp_path / "tars" / "b.tar").symlink_to("a.tar")
    assert make_tar_source(tmp_path / "tars", image_size=8, heldout_share=0.1).class_names == ("a", "b")
    (tmp_path / "tars" / "c.tar").symlink_to("nowhere")
    assert "c.tar is no plain .tar" in refusal(tmp_path / "tars")


def test_the_last_of_members_with_one_name_counts(tmp_path):
    old, new = (tar_bytes({f"{i}.JPEG": image_bytes(seed + i) for i in range(10)}) for seed in (0, 100))
    end = old.rstrip(b"\0")
    joined = old[: -(-len(end) // 512) * 512] + new  # what `tar --append` writes
    (tmp_path / "t.tar").write_bytes(tar_bytes({"a.tar": joined}))
    (tmp_path / "new.tar").write_bytes(tar_bytes({"a.tar": new}))
    both, only = (make_tar_source(tmp_path / name, image_size=8, heldout_share=0.1) for name in ("t.tar", "new.tar"))
    assert both.description == only.description
    for item in both.splits["train"]:
        np.testing.assert_array_equal(both.load(item)[0], only.load(item)[0])


def test_a_damaged_image_is_no_damaged_archive(tmp_path):
    classes = make_classes({"a": 10})
    classes["a"]["a_3.JPEG"] = classes["a"]["a_3.JPEG"][:100]
    source = make_tar_source(write_archive(tmp_path / "t.tar", classes), image_size=8, heldout_share=0.1)
    (item,) = [item for item in all_items(source) if item.source_id == "a/a_3.JPEG"]
    with pytest.raises(ImageError, match="Truncated"):
        source.load(item)
    (tmp_path / "t.tar").write_bytes(b"")
    with pytest.raises(ImageError, match="has become shorter"):
        source.load(item)
    (tmp_path / "t.tar").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        source.load(item)


def refusal(path):
    with pytest.raises(UserError) as caught:
        make_tar_source(path, image_size=8, heldout_share=0.1)
    text = str(caught.value)
    assert text.startswith(f"--input={path}") and text.splitlines() == [text]
    return text


def test_truncated_archives_name_the_byte(tmp_path):
    """Cut anywhere, not only in the middle of a file, an archive is refused: no image is lost in silence."""
    path = write_archive(tmp_path / "t.tar", make_classes({"a": 3, "b": 3}))
    whole = path.read_bytes()
    closing = len(whole.rstrip(b"\0")) // 512 * 512 + 1024  # the inner archive's zeros come before the outer's
    for length in [*range(0, closing, 1111), *range(0, closing - 1024, 512 * 5)]:
        path.write_bytes(whole[:length])
        assert "damaged at byte " in refusal(path)


def test_flipped_header_bits_name_the_byte(tmp_path):
    path = write_archive(tmp_path / "t.tar", make_classes({"a": 4}))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        inner = tar.next().offset_data
        with tarfile.open(fileobj=tar.extractfile("a.tar")) as class_tar:
            headers = [0, *(inner + entry.offset for entry in class_tar)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        header = int(rng.choice(headers))
        changed = bytearray(whole)
        changed[header + rng.integers(512)] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            source = make_tar_source(path, image_size=8, heldout_share=0.3)
        except UserError as error:
            assert f"damaged at byte {header} " in str(error)
        else:  # the blank after the digits of the checksum is all that no checksum covers
            assert len(all_items(source)) == 4


def test_useless_archives_say_what_to_do(tmp_path):
    images = tar_bytes({"a.JPEG": image_bytes(0)})
    cases = {
        "nothing.tar": (b"", "damaged at byte 0 (empty file)"),
        "text.tar": (b"text" * 1000, "damaged at byte 0 (invalid header)"),
        "flat.tar": (images, "holds no .tar files"),
        "outer.tar": (gzip.compress(tar_bytes({"a.tar": images})), "is compressed with gzip, decompress it first"),
        "inner.tar": (
            tar_bytes({"a.tar": gzip.compress(images)}),
            "(the archive at byte 512): is compressed",
        ),
        "empty.tar": (tar_bytes({"a.tar": images, "b.tar": tar_bytes({})}), "class b holds no images"),
        "twice.tar": (tar_bytes({"x/a.tar": images, "y/a.tar": images}), "holds two archives a.tar"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert message in refusal(tmp_path / name)
    assert "no such archive" in refusal(tmp_path / "nowhere.tar")
    (tmp_path / "folder").mkdir()
    assert "holds no .tar files" in refusal(tmp_path / "folder")
    assert "local file system" in refusal("gs://bucket/train.tar")
    (tmp_path / "folder" / "a.tar").write_bytes(images)
    for option in ({"image_size": 0}, {"channels": 2}, {"heldout_share": 1.5}):
        with pytest.raises(UserError, match=next(iter(option))):
            make_tar_source(tmp_path / "folder", **option)


@pytest.mark.parametrize(
    "kind, size, message",
    [(b"S", 600, "a sparse file")]
    + [(kind, 3 << 30, "damaged at byte 512 (a header of 3221225472 bytes)") for kind in (b"x", b"L", b"g")],
)
def test_sparse_members_and_gigabytes_of_names_are_refused(tmp_path, kind, size, message):
    header = bytearray(tar_bytes({"a.JPEG": b"x" * 600}))
    header[156:157], header[124:136] = kind, tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % (sum(header[:512]) - sum(header[148:156]) + 256)
    (tmp_path / "t.tar").write_bytes(tar_bytes({"a.tar": bytes(header)}))
    assert message in refusal(tmp_path / "t.tar")
