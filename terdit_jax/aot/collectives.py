"""The collectives of a compiled program, read from its HLO text: each one's bytes and mesh axes.

Pure functions of text: nothing is compiled here. Dtypes are reported as the compiler left them; XLA's CPU backend turns
bfloat16 collectives into float32 ones, so bytes of bfloat16 must be read from a program for an accelerator.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import re

import numpy as np

from terdit_jax.aot.hlo import Array, read_arrays, read_ints, search, split_computations, trip_counts

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that one collective moves. Attributes:

    kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, collective-broadcast.
    dtype: as HLO writes it (u8, bf16, f32, ...).
    shape: of the whole array in one group: what an all-gather gives, what a reduction or an exchange takes.
    groups: the devices that take part together, as places in the mesh's flattened order.
    trips: how often the collective runs each time the program does: the trip counts of the loops around it, multiplied.
    name: the instruction's.
    source: the operation of the traced program that it stems from, "" if the compiler does not say.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    groups: Groups
    trips: int
    name: str
    source: str

    @property
    def bytes(self) -> int:
        """Size of the whole array, once."""
        return Array(self.dtype, self.shape).bytes

    @property
    def group_size(self) -> int:
        return max(len(group) for group in self.groups)

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all trips, by ring algorithms: (n - 1) / n of the array, twice for an
        all-reduce (a reduce-scatter and an all-gather); a permutation sends all of it."""
        if self.kind == "collective-permute":
            return float(self.trips * self.bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return self.trips * self.bytes * passes * (self.group_size - 1) / self.group_size


def read_collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program that more than one device takes part in, in the text's order.

    A collective of several arrays gives one entry each. Trip counts are the compiler's where it states them; otherwise
    a loop is taken to count from 0 in ones up to the constant that its condition compares with. Of branches, all are
    counted. TPU programs repeat an asynchronous collective in every fusion that carries a part of it, as one chain: it
    is counted once.

    Args:
      hlo: `jax.stages.Compiled.as_text()` of a program compiled for one replica and any number of partitions.

    Raises:
      ValueError: text without an entry computation, a loop without a trip count, unknown dtypes or groups.
    """
    computations, entry = split_computations(hlo)
    num_devices = int(search(r"num_partitions=(\d+)", hlo, "1"))
    trips = trip_counts(computations, entry)
    found: dict[tuple, list[Collective]] = {}
    for computation, lines in computations.items():
        if not trips.get(computation):
            continue
        for line in lines:
            match = _COLLECTIVE.match(line)
            if match is None:
                continue
            kind = match["kind"]
            if computation.startswith("all-reduce-scatter"):  # the TPU compiler's reduce-scatter: a sum, then a slice
                kind = "reduce-scatter" if kind == "all-reduce" else kind
            arrays = _parse(kind, match, line, num_devices, trips[computation])
            chain = search(r'chain_id="(\d+)"', line, "")
            key = (chain,) if chain else (computation, match["name"])
            # The part that starts a chain stands outside the inner loops that later parts may overlap with.
            if key not in found or arrays[0].trips < found[key][0].trips:
                found[key] = arrays
    return [collective for arrays in found.values() for collective in arrays if collective.group_size > 1]


def mesh_axes(collective: Collective, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective's groups extend, in the mesh's order.

    For a permutation these are the axes along which any array moves. `mesh_shape` is `Mesh.shape`, whose order is the
    order of places.
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(mesh_shape.values())), tuple(mesh_shape.values())))
    moves = np.zeros(len(mesh_shape), bool)
    for group in collective.groups:
        cut = places[:, list(group)]
        moves |= (cut != cut[:, :1]).any(axis=1)
    return tuple(axis for axis, moved in zip(mesh_shape, moves, strict=True) if moved)


def sent_bytes(collectives: Iterable[Collective]) -> float:
    """Bytes that one device sends, `Collective.sent` summed."""
    return sum(collective.sent for collective in collectives)


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(
    rf"\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\S.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<operands>[^)]*)\)"
)


def _parse(kind: str, match: re.Match, line: str, num_devices: int, trips: int) -> list[Collective]:
    groups = _pairs(line) if kind == "collective-permute" else _groups(line, num_devices)
    arrays = read_arrays(match["type"])
    operands = match["operands"].count("%") or match["operands"].count(",") + 1
    if match["start"] and len(arrays) >= 2 * operands:  # (what goes in, what comes out, bookkeeping)
        arrays = arrays[operands : 2 * operands]
    source = search(r'op_name="([^"]*)"', line, "")
    collectives = []
    for array in arrays:
        shape = array.shape
        if match["kind"] == "reduce-scatter":  # its result is a device's part
            cut = int(search(r"dimensions=\{(\d+)\}", line, "0"))
            shape = (*shape[:cut], shape[cut] * len(groups[0]), *shape[cut + 1 :])
        collectives.append(Collective(kind, array.dtype, shape, groups, trips, match["name"], source))
    return collectives


def _pairs(line: str) -> Groups:
    pairs = search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line, "")
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs) if a != b) or ((0,),)


def _groups(line: str, num_devices: int) -> Groups:
    """Replica groups in any of HLO's three notations: lists, iota [4,2]<=[8]T(1,0), and named axes of a mesh."""
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        groups = tuple(tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", match[1]))
        return groups or (tuple(range(num_devices)),)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _rows(_iota(match[2]).reshape(read_ints(match[1])))
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
        axes, order, along = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        places = _iota(order) if order and order.startswith("[") else np.arange(math.prod(sizes.values()))
        return _rows(_along(places, sizes, along))
    raise ValueError(f"replica groups in an unknown notation: {line.strip()[:400]}")


def _along(places: np.ndarray, sizes: dict[str, int], along: str) -> np.ndarray:
    """(groups, members) of places laid out over named axes; `along` names whole axes 'a' or parts 'a':(before)size."""
    dims: list[int] = []
    members: list[int] = []
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)}
    for name, total in sizes.items():
        if name in wanted and wanted[name][1]:
            before, size = int(wanted[name][0]), int(wanted[name][1])
            members.append(len(dims) + 1)
            dims += [before, size, total // (before * size)]
        else:
            if name in wanted:
                members.append(len(dims))
            dims.append(total)
    others = [axis for axis in range(len(dims)) if axis not in members]
    return places.reshape(dims).transpose(others + members).reshape(-1, math.prod(dims[axis] for axis in members))


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): counting along a shape, transposed, flat."""
    shape, _, order = text.partition("T")
    places = np.arange(math.prod(read_ints(shape))).reshape(read_ints(shape))
    return (places.transpose(read_ints(order)) if order else places).ravel()


def _rows(places: np.ndarray) -> Groups:
    return tuple(tuple(int(place) for place in row) for row in places)
