"""Sound files other than models, with what reads them: data sets, checkpoints, npz, archives, images, reports.

Each format has the function of ours that reads it, and what may come of damage that nobody signed; `fuzz_files` damages
them, `forged_data` forges them.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import io
import json
from pathlib import Path
import tarfile
import tempfile

import jax
import numpy as np

from terdit_jax.aot.table import make_tables
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.config import RunConfig, freeze
from terdit_jax.config_file import load_config
from terdit_jax.data import builder, reader, sources
from terdit_jax.data.codec import PixelCodec
from terdit_jax.data.crop import ImageError, decode_crop
from terdit_jax.data.inspection import format_report, inspect
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.data.tar_source import make_tar_source
from terdit_jax.data.tfds_source import make_tfds_source
from terdit_jax.data.unfinished import PLAN_FILE, FinishedShard, Unfinished
from terdit_jax.errors import UserError
from terdit_jax.evaluation import reference
from terdit_jax.evaluation.image_source import open_images
from terdit_jax.inference.shards import Shards
from terdit_jax.interop.vae_weights import load_vae, vae_identity
from terdit_jax.interop.weights import open_weights
from terdit_jax.training.resume import check_resumable
from tests.commands import no_flags
from tests.deployed import make_workdir
from tests.forged_data import (
    IMAGES,
    MODULE,
    Files,
    Random,
    edit_metadata,
    forge_npz,
    forge_png,
    forge_tar,
    plant_class,
    sign_checkpoint,
    sign_data_set,
)
from tests.fuzz_judge import SENTINEL
from tests.image_files import encode, tar_bytes
from tests.test_builder import make_source
from tests.test_tfds_source import make_examples, write_data_set

with no_flags():
    from terdit_jax.evaluate import _load_samples

Forger = Callable[[Files, str, Random], None]
ROOT = Path(__file__).parent
PLAN = {"num_samples": 5, "shard_size": 3, "seed": 0, "sample": {"cfg_scale": 2.0, "method": "ddim"}, "labels": [1, 2]}


@dataclasses.dataclass(frozen=True)
class Format:
    """A folder of files. Attributes:

    kind: of file.
    files: relative path -> content.
    opened: what `load` is given, relative to the folder.
    victims: those that are damaged.
    survivors: what may come of damage that nobody signed: "same" or "any".
    load: reads it and returns a digest, or raises UserError.
    forgers: by name; each changes the files.
    sign: puts the checksums right, in half of the cases.
    share: of the cases, beside that of others: less where loading takes long.
    """

    kind: str
    files: Files
    opened: str
    victims: tuple[str, ...]
    survivors: str
    load: Callable[[Path], str]
    forgers: dict[str, Forger] = dataclasses.field(default_factory=dict)
    sign: Callable[[Files], None] | None = None
    share: float = 1.0


def _digest(*values) -> str:
    sha = hashlib.sha256()
    for value in values:
        sha.update(
            repr((value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value).encode()
        )
    return sha.hexdigest()


def read_folder(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _load_workdir(path: Path) -> str:
    weights = open_weights(path)
    return _digest(weights.description.to_dict(), *(part for name, leaf in weights.leaves() for part in (name, leaf)))


def _resume(path: Path, config, target: dict, fingerprint: str) -> str:
    checkpoints = Checkpoints(path)
    changes = check_resumable(checkpoints.newest_run(), config, fingerprint, str(path))
    state, _ = checkpoints.restore(target)
    return _digest(changes, *map(np.asarray, jax.tree.leaves(state)))


def _workdirs() -> list[Format]:
    with tempfile.TemporaryDirectory() as folder:
        saved = make_workdir(Path(folder), steps=(1,), hidden_size=16, depth=1, ffn_multiple_of=16)
        files, run = read_folder(Path(folder)), Checkpoints(folder).newest_run()
    config = freeze(run["config"])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
        for name, tree in zip(("params", "ema_params"), saved[1], strict=True)
    }
    resume = functools.partial(_resume, config=config, target=target, fingerprint=run["data_fingerprint"])
    victims = tuple(name for name in files if not name.endswith(".png"))
    return [
        Format("workdir", files, ".", victims, "same", _load_workdir, sign=sign_checkpoint, share=0.5),
        Format("workdir, resumed", files, ".", victims, "same", resume, sign=sign_checkpoint, share=0.5),
    ]


def _load_data_set(path: Path) -> str:
    dataset = reader.open_dataset(path)
    records = dataset.records("train")
    batch = records.read(np.arange(len(records))[:: max(1, len(records) // 8)])
    return _digest(dataset.metadata.fingerprint, *batch.values())


def _look_at(path: Path) -> str:
    dataset = reader.open_dataset(path)
    return _digest(format_report(dataset.metadata, inspect(dataset, 5)))


def _load_unfinished(path: Path) -> str:
    unfinished = Unfinished(reader.as_path(path), {"kind": "digits", "shards": {"train": 2}})
    finished = unfinished.finished("latents-train.array_record-00000-of-00001")
    if finished is None:
        raise UserError("a shard is missing")
    return _digest(dataclasses.asdict(finished))


def _data_sets() -> list[Format]:
    with tempfile.TemporaryDirectory() as folder:
        metadata = builder.build(make_source(12, 12), Path(folder) / "d", codec=PixelCodec(), shard_bytes=1000)
        files = read_folder(Path(folder) / "d")
    shards = tuple(name for name in files if "array_record" in name)
    shard = dataclasses.replace(metadata.splits["heldout"].shards[0], file="latents-train.array_record-00000-of-00001")
    finished = FinishedShard(shard, 12, (1.0,), (2.0,), (("a.png", "no image"),))
    content = next(content for name, content in files.items() if "heldout" in name and "00000-of" in name)
    unfinished = {
        f".unfinished/{PLAN_FILE}": json.dumps({"kind": "digits", "shards": {"train": 2}}).encode(),
        f".unfinished/{shard.file}.json": json.dumps(dataclasses.asdict(finished)).encode(),
        shard.file: content[: shard.bytes],
    }
    latents, whole = ("latents.json",), ("latents.json", "features.json", "dataset_info.json")
    return [
        Format("latents.json", files, ".", latents, "any", _load_data_set, sign=sign_data_set),
        Format("shards", files, ".", shards, "same", _load_data_set, sign=sign_data_set),
        Format("data set, inspected", files, ".", whole, "any", _look_at, sign=sign_data_set),
        Format("unfinished data set", unfinished, ".", tuple(unfinished)[:2], "any", _load_unfinished),
    ]


def _load_tfds(path: Path) -> str:
    return _load_source(make_tfds_source("animals", data_dir=path, image_size=8))


def _load_source(source: sources.Source) -> str:
    items = source.splits["train"][:3] + source.splits["heldout"][:3]
    return _digest(source.class_names, *(part for item in items for part in source.load(item)))


def _tfds() -> list[Format]:
    code = (
        f"open({SENTINEL!r}, 'w').close()\nimport tensorflow_datasets as tfds\nclass Evil(tfds.features.Text): pass\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(Path(folder), {"train": make_examples(10)})
        files = read_folder(Path(folder)) | {f"{MODULE}.py": code.encode()}
    victims = tuple(name for name in files if name.startswith("animals/"))
    forgers = {"class": plant_class, "metadata": edit_metadata}
    return [Format("TFDS data set", files, ".", victims, "any", _load_tfds, forgers)]


def _npz(**members) -> bytes:
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def _load_images(path: Path) -> str:
    source = open_images(path)
    return _digest(*source.stream(0, source.count, 4))


def _load_reference(path: Path) -> str:
    keys = {"pool": ("mu", "sigma", 8), "spatial": ("mu_s", "sigma_s", 4)}  # as Inception's, with fewer features
    original, reference.KEYS = reference.KEYS, keys
    try:
        found = reference.read_statistics(path)
    finally:
        reference.KEYS = original
    return _digest(sorted(found), *(part for statistics in found.values() for part in statistics[:2]))


def _load_labelled(path: Path) -> str:
    images = _load_samples(str(path), make_synthetic((8, 8, 3), 10))
    return _digest(images.images, images.labels)


def _load_shard(path: Path) -> str:
    shards = Shards(path / "out.npz", PLAN)
    found = [shards.read(number) for number in range(len(shards.sizes))]
    if None in found:
        raise UserError("a shard is drawn again")
    return _digest(*(part for shard in found for part in shard))


def _npz_formats() -> list[Format]:
    matrix = np.random.default_rng(1).normal(size=(8, 20))
    some = matrix[:4]
    statistics = _npz(mu=matrix.mean(1), sigma=np.cov(matrix), mu_s=some.mean(1), sigma_s=np.cov(some))
    images = _npz(arr_0=IMAGES, labels=np.arange(6))
    forgers = {"member": forge_npz}
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder) / "out.npz", PLAN)
        for number, size in enumerate(shards.sizes):
            shards.write(number, IMAGES[:size], np.arange(size))
        drawn = read_folder(Path(folder))
    npz = tuple(name for name in drawn if name.endswith(".npz"))
    return [
        Format("npz of images", {"a.npz": images}, "a.npz", ("a.npz",), "same", _load_images, forgers),
        Format("npz of samples", {"a.npz": images}, "a.npz", ("a.npz",), "same", _load_labelled, forgers),
        Format("npz of a reference", {"a.npz": statistics}, "a.npz", ("a.npz",), "same", _load_reference, forgers),
        Format("plan of an image set", drawn, ".", tuple(set(drawn) - set(npz)), "same", _load_shard),
        Format("shards of an image set", drawn, ".", npz, "same", _load_shard, forgers),
    ]


def _encode(name: str) -> bytes:
    return encode(IMAGES[0].repeat(3, 0).repeat(3, 1), name)


def _tar(members: Files) -> bytes:
    return tar_bytes(members, tarfile.PAX_FORMAT)


def _load_image(path: Path) -> str:
    return _digest(decode_crop(path.read_bytes(), 8, 3))


def _load_tar(path: Path) -> str:
    return _load_source(make_tar_source(path, image_size=8, heldout_share=0.4))


def _image_formats() -> list[Format]:
    formats = []
    for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        file = f"a.{name.lower()}"
        forgers = {"chunk": forge_png} if name == "PNG" else {}
        formats.append(Format(name, {file: _encode(name)}, file, (file,), "any", _load_image, forgers))
    classes = {f"n{i}.tar": _tar({f"n{i}_{j}.png": _encode("PNG") for j in range(3)}) for i in range(2)}
    forgers = {"header": forge_tar}
    folder = {"0.png": _encode("PNG"), "1.png": _encode("PNG"), "labels.json": b"[1, 2]"}
    formats.append(Format("folder of images", folder, ".", tuple(folder), "any", _load_images))
    formats.append(Format("tar of tars", {"a.tar": _tar(classes)}, "a.tar", ("a.tar",), "any", _load_tar, forgers))
    formats.append(Format("folder of tars", classes, ".", tuple(classes), "any", _load_tar, forgers))
    return formats


def _load_config(path: Path) -> str:
    return _digest(freeze(load_config(path)).to_dict())


def _others() -> list[Format]:
    vae = read_folder(ROOT / "golden" / "vae_tiny")
    vae = {name: content for name, content in vae.items() if name.endswith((".json", ".safetensors"))}
    config = json.dumps(RunConfig().to_dict())
    report = (ROOT.parent / "docs" / "pods" / "train_h200_8.json").read_bytes()
    return [
        Format("VAE", vae, ".", tuple(vae), "any", lambda path: vae_identity(*load_vae(path)), share=0.3),
        Format("config.json", {"config.json": config.encode()}, "config.json", ("config.json",), "any", _load_config),
        Format("report", {"a.json": report}, ".", ("a.json",), "any", lambda path: make_tables(reader.as_path(path))),
    ]


def make_formats() -> list[Format]:
    """All of them, small."""
    return [*_workdirs(), *_data_sets(), *_tfds(), *_npz_formats(), *_image_formats(), *_others()]


def refusing(load: Callable[[Path], str]) -> Callable[[Path], str]:
    """`load`, where an image that cannot be used, which `prepare` counts and names, is refused as other files are."""

    @functools.wraps(load)
    def loaded(path: Path) -> str:
        try:
            return load(path)
        except ImageError as error:
            raise UserError(str(error)) from error

    return loaded
