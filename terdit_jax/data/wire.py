"""Finds the fields of a serialized record without parsing it, at protobuf's own offsets.

What a record holds is the schema's; reading shards and assembling batches are the reader's.
"""

from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

from google.protobuf.message import DecodeError
import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from terdit_jax.data import schema

_LABEL_SIZES = (1, 2, 3)  # bytes of a label below 128, 16,384 and 2,097,152
_MAX_LABEL = np.iinfo(np.int32).max


class View(NamedTuple):
    """One of a record's two views: the bytes of mean and std, (H, W, C) little-endian float16, and the label."""

    mean: memoryview
    std: memoryview
    label: int


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Records of one length: where each field lies, and the bytes around the fields, equal in all of them."""

    spans: dict[str, slice]  # a field's bytes
    framing: tuple[bytes, ...]  # what lies between
    starts: tuple[int, ...]  # of the framing

    def matches(self, data: bytes) -> bool:
        return all(map(data.startswith, self.framing, self.starts))


class RecordParser:
    """Takes one view out of serialized records of `shape` (H, W, C), and looks at no byte of the other.

    Records of one length, written by `schema.encode_record`, differ in the fields' contents only: tags, names and
    lengths are the same bytes at the same offsets. So protobuf itself serializes one, and those that agree with it
    outside the fields are read at its offsets. Any other record goes through protobuf's parser.
    """

    def __init__(self, shape: tuple[int, int, int], has_mirror: bool):
        self._names = schema.array_names(has_mirror)
        self._array_bytes = 2 * int(np.prod(shape))
        self._layouts: dict[int, tuple[_Layout, ...]] = {}

    def parse(self, data: bytes, mirrored: bool) -> View:
        """The picture's view of a record, or its mirror's.

        Raises:
          ValueError: the bytes are no record of this shape.
        """
        mean, std = self._names[2:] if mirrored else self._names[:2]
        layouts = self._layouts.get(len(data))
        if layouts is None:  # threads that meet here make equal ones
            layouts = self._layouts[len(data)] = tuple(self._make_layouts(len(data)))
        for layout in layouts:
            if layout.matches(data) and (label := _decode_varint(data[layout.spans["label"]])) is not None:
                content = memoryview(data)
                return View(content[layout.spans[mean]], content[layout.spans[std]], label)
        return self._parse_any(data, mean, std)

    def _parse_any(self, data: bytes, mean: str, std: str) -> View:
        try:
            fields = tf_example_pb2.Example.FromString(data).features.feature
        except DecodeError as error:
            raise ValueError("not a tf.train.Example") from error
        for name in self._names:
            if [len(value) for value in fields[name].bytes_list.value] != [self._array_bytes]:
                raise ValueError(f"its {name} is not an array of {self._array_bytes} bytes")
        labels = fields["label"].int64_list.value
        if len(labels) != 1 or not 0 <= labels[0] <= _MAX_LABEL:
            raise ValueError("its label is not the number of a class")
        return View(*(memoryview(fields[name].bytes_list.value[0]) for name in (mean, std)), labels[0])

    def _make_layouts(self, size: int) -> Iterator[_Layout]:
        """Those that a record of `size` bytes can have: the label and the picture's name vary in length."""
        if size < self._array_bytes * len(self._names):  # no record: one is not made only to be compared with it
            return
        for label_size in _LABEL_SIZES:
            spare = size - len(self._serialize(label_size, 0))
            # A longer name also takes up to ten bytes more for the five lengths that surround it.
            for name_size in range(max(spare - 10, 0), spare + 1):
                if len(self._serialize(label_size, name_size)) == size:
                    yield self._make_layout(label_size, name_size)

    def _make_layout(self, label_size: int, name_size: int) -> _Layout:
        base = np.frombuffer(self._serialize(label_size, name_size), np.uint8)
        spans = {}
        for field in (*self._names, "label", "source_id"):
            changed = np.flatnonzero(base != np.frombuffer(self._serialize(label_size, name_size, field), np.uint8))
            if changed.size:  # the name may be empty
                spans[field] = slice(int(changed[0]), int(changed[-1]) + 1)
        in_order = sorted(spans.values(), key=lambda span: span.start)
        starts, stops = (0, *(span.stop for span in in_order)), (*(span.start for span in in_order), len(base))
        framing = tuple(base[start:stop].tobytes() for start, stop in zip(starts, stops, strict=True))
        return _Layout(spans, framing, starts)

    def _serialize(self, label_size: int, name_size: int, changed: str = "") -> bytes:
        """A record of the least bits there can be, but for one field, each byte of which is changed."""
        example = tf_example_pb2.Example()
        fields = example.features.feature
        sizes = dict.fromkeys(self._names, self._array_bytes) | {"source_id": name_size}
        for name, size in sizes.items():
            fields[name].bytes_list.value.append((b"\xff" if name == changed else b"\x00") * size)
        least = 1 << 7 * (label_size - 1) if label_size > 1 else 0
        fields["label"].int64_list.value.append((1 << 7 * label_size) - 1 if changed == "label" else least)
        return example.SerializeToString(deterministic=True)


def _decode_varint(data: bytes) -> int | None:
    """The number that the bytes encode, seven bits each, low ones first; None if they are not exactly one number."""
    number = 0
    for place, byte in enumerate(data):
        if (byte > 127) == (place == len(data) - 1):  # the top bit says that another byte follows
            return None
        number |= (byte & 127) << 7 * place
    return number
