"""Files other than models, forged by somebody who knows their formats and puts right what covers them.

Each forger changes one file among those of a folder; the formats and who reads them are in `data_formats`.
"""

import contextlib
import hashlib
import io
import json
import struct
import zipfile
import zlib

import numpy as np

from terdit_jax.data import schema
from tests.forged_containers import JUNK

Random = np.random.Generator
Files = dict[str, bytes]
MODULE = "a_module_of_a_forger"
TFDS_FILES = ("animals/1.0.0/features.json", "animals/1.0.0/dataset_info.json")
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


def edit_json(files: Files, victim: str, random: Random) -> None:
    """One to three values, keys or lengths of the victim's JSON, which is changed as a forger would."""
    value = json.loads(files[victim])
    for _ in range(random.integers(1, 4)):
        value = _edit(value, random)
    text = json.dumps(value)
    if random.random() < 0.1:
        text = text.replace("{", '{"x": 1, "x": 1, ' if random.random() < 0.5 else "{" * 2, 1)
    files[victim] = text.encode("utf-8", errors="surrogatepass")


def _edit(value, random: Random):
    """A copy with one place of it changed."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = list(value)[random.integers(len(value))]
        choice = random.integers(10)
        if choice == 0:
            return {other: entry for other, entry in value.items() if other != key}
        if choice == 1:
            return {(f"{key}/../x" if other == key else other): entry for other, entry in value.items()}
        if choice == 2:
            return {**value, str(_junk(random))[:50]: _junk(random)}
        return {**value, key: _edit(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place, choice = random.integers(len(value)), random.integers(10)
        if choice == 0:
            return value[:place] + value[place + 1 :]
        if choice == 1:
            return value + value
        return [*value[:place], _edit(value[place], random), *value[place + 1 :]]
    if isinstance(value, str) and random.random() < 0.6:
        texts = ("/etc/passwd", "../" + value, value + "/", "/" + value, value * 2, value[:-1], f"{MODULE}.Evil", "a.b")
        return texts[random.integers(len(texts))]
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.6:
        numbers = (-value, value + 1, value * 1000, value / 3, value - 1, str(value), value == 1, value * 1e300)
        return numbers[random.integers(len(numbers))]
    return _junk(random)


def _junk(random: Random):
    junk = JUNK[random.integers(len(JUNK))]
    return "enormous" if isinstance(junk, int) and abs(junk) > 1 << 4000 else junk  # json writes no such number


def sign_checkpoint(files: Files) -> None:
    """The manifest of every step, over what is there now."""
    steps = {name.rpartition("/")[0] for name in files if name.endswith("sha256.json")}
    for step in steps:
        digests = {
            name.removeprefix(f"{step}/"): hashlib.sha256(content).hexdigest()
            for name, content in files.items()
            if name.startswith(f"{step}/") and not name.endswith("sha256.json")
        }
        files[f"{step}/sha256.json"] = json.dumps(digests).encode()


def sign_data_set(files: Files) -> None:
    """The sizes and checksums of shards and the fingerprint of latents.json, as far as it still makes sense."""
    try:
        raw = json.loads(files["latents.json"])
        for split in raw["splits"].values():
            for shard in split["shards"]:
                if content := files.get(shard["file"]):
                    shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        sign_metadata(raw)
        files["latents.json"] = json.dumps(raw).encode("utf-8", errors="surrogatepass")
    except (ValueError, TypeError, KeyError, AttributeError):
        pass


@contextlib.contextmanager
def edited(path):
    """The content of a JSON file, to be changed."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def sign_metadata(raw: dict) -> None:
    """The fingerprint of what latents.json holds. Raises one of many errors where there is none."""
    splits = {
        name: schema.Split(split["records"], tuple(schema.Shard(**shard) for shard in split["shards"]))
        for name, split in raw["splits"].items()
    }
    raw["fingerprint"] = schema.compute_fingerprint(schema.Metadata(**{**raw, "splits": splits}))


def plant_class(files: Files, victim: str, random: Random) -> None:
    """Features that name a class of the forger's module, which lies beside them, somewhere in the tree."""
    evil = {"pythonClassName": f"{MODULE}.Evil", "jsonFeature": {"json": "{}"}}
    if random.random() < 0.3:
        evil = {"type": f"{MODULE}.Evil", "content": {}}
    features = json.loads(files[TFDS_FILES[0]])
    if random.random() < 0.3:
        info = json.loads(files[TFDS_FILES[1]])
        files[TFDS_FILES[1]] = json.dumps(info | {"features": evil}).encode()
    if random.random() < 0.8:
        fields = features["featuresDict"]["features"]
        core = "tensorflow_datasets.core.features"
        nested = {
            "pythonClassName": f"{core}.sequence_feature.Sequence", "sequence": {"feature": evil, "length": "-1"},
        }  # fmt: skip
        fields[("image", "label", "x")[random.integers(3)]] = evil if random.random() < 0.5 else nested
    else:
        features = evil
    files[TFDS_FILES[0]] = json.dumps(features).encode()


def edit_metadata(files: Files, victim: str, random: Random) -> None:
    edit_json(files, TFDS_FILES[random.integers(2)], random)


def forge_npz(files: Files, victim: str, random: Random) -> None:
    """A member replaced: by bytes, another array, a pickled one, a header that promises more, or a bomb."""
    with zipfile.ZipFile(io.BytesIO(files[victim])) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = list(members)[random.integers(len(members))]
    shape = [int(n) for n in random.choice((-1, 0, 1, 3, 6, 8, 1 << 20, 1 << 40, 1 << 63), random.integers(0, 6))]
    header = {
        "descr": ("|u1", "<f8", "|O", "<U4", "|V1", "<i8", ">f4", "<c16")[random.integers(8)],
        "shape": tuple(shape),
    }
    arrays = (
        np.array([{}], object), np.array("text"), np.array(["a", "b"]), np.zeros(3, [("a", "f4"), ("b", "O")]),
        np.zeros((6, 8, 8, 3)), np.asfortranarray(IMAGES), np.full(6, np.nan), np.full((8, 8), 1e308), np.array(5),
        np.zeros((6, 8, 8, 1), np.uint8), np.zeros((1, 1, 1, 3), np.uint8), np.zeros((0, 8), np.float32),
        np.arange(6) * (1 << 40), np.array([True] * 6), np.zeros(6, "M8[s]"), np.full((8, 8), -1.0),
        np.ones((8, 8), "f2"),
    )  # fmt: skip
    choice = random.integers(7)
    if choice == 0:
        members[name] = (b"", b"text", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", random.bytes(300))[
            random.integers(5)
        ]
    elif choice == 1:
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header | {"fortran_order": bool(random.integers(2))})
        members[name] = content.getvalue() + random.bytes(int(random.integers(0, 2000)))
    elif choice == 2:
        text = repr(header | {"fortran_order": "()"[random.integers(2)]}) + "(" * int(random.integers(3000)) + "\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    elif choice == 3:
        del members[name]
    elif choice == 4:
        members[name] = members[list(members)[random.integers(len(members))]]
    else:
        content = io.BytesIO()
        np.lib.format.write_array(content, arrays[random.integers(len(arrays))], allow_pickle=True)
        members[name] = content.getvalue()
    packing = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[random.integers(4)]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for member, content in members.items():
            archive.writestr(member, content + bytes((1 << 24) * (random.random() < 0.02)))
    files[victim] = file.getvalue()


def forge_tar(files: Files, victim: str, random: Random) -> None:
    """Fields of some headers changed, with their checksums put right."""
    data = bytearray(files[victim])
    starts = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    for _ in range(random.integers(1, 4)):
        place = starts[random.integers(len(starts))]
        choice = random.integers(5)
        if choice == 0:
            sizes = (
                b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"00000000000\0",
                random.bytes(12),
            )  # fmt: skip
            data[place + 124 : place + 136] = sizes[random.integers(6)]
        elif choice == 1:
            data[place + 156] = b"01234567SLKxgVD\0\xff"[random.integers(17)]
        elif choice == 2:
            names = (b"/etc/passwd", b"../../x.png", b"", b".hidden", b"a\nb.png", b"\xff\xfe.png", b"x/" * 40)
            data[place : place + 100] = names[random.integers(7)].ljust(100, b"\0")
        elif choice == 3:
            pax = (b"25 size=9999999999999999\n", b"99 path=x\n", b"-1 a=b\n", b"30 GNU.sparse.size=1\n", b"9" * 5000)
            data[place + 512 : place + 512 + 25] = pax[random.integers(5)][:25].ljust(25, b"\0")
        else:
            data[place + 345 : place + 500] = random.bytes(155)
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    files[victim] = bytes(data)


def forge_png(files: Files, victim: str, random: Random) -> None:
    """A chunk of a PNG changed, with its CRC put right."""
    data, chunks, place = files[victim], [], 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + size]])
        place += size + 12
    kind, content = chunks[0]
    choice = random.integers(5)
    if choice == 0:
        sides = (0, 1, 2, 100, 30_000, 65_536, 1 << 31, (1 << 32) - 1)
        size = struct.pack(">II", *(sides[random.integers(8)] for _ in range(2)))
        chunks[0][1] = size + content[8:]
    elif choice == 1:
        chunks[0][1] = content[:8] + bytes(random.integers(0, 20, 5, np.uint8))
    elif choice == 2:
        chunks.insert(
            1, [(b"iCCP", b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"eXIf", b"acTL")[random.integers(7)], random.bytes(50)]
        )
    elif choice == 3:
        chunks.insert(1, [b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 24))])
    else:
        chunks[-2][1] = zlib.compress(random.bytes(500) + bytes((1 << 22) * int(random.integers(2))))
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    files[victim] = data[:8] + b"".join(parts)
