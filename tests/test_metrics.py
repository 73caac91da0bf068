"""metrics.jsonl survives kills and continuations: what was written before the checkpoint stays, the rest goes."""

import errno
import json
import os

import pytest

from terdit_jax.training.metrics import METRICS_FILE, MetricsWriter


def open_writer(workdir, start_step=0):
    return MetricsWriter(workdir, start_step)


def read(workdir):
    return (workdir / METRICS_FILE).read_bytes()


def parse(workdir):
    """The lines under JSON's own rules, which know no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in read(workdir).splitlines()]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    writer = open_writer(tmp_path)
    assert read(tmp_path) == b""
    writer.write(100, {"loss": 0.5}, {"images_per_second": 12.0})
    assert parse(tmp_path) == [{"step": 100, "loss": 0.5, "timing": {"images_per_second": 12.0}}]
    writer.write(200, {"heldout_loss": 0.25})
    assert parse(tmp_path)[1:] == [{"step": 200, "heldout_loss": 0.25}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_without_a_value_is_null(tmp_path, value):
    open_writer(tmp_path).write(1, {"loss": value, "mse": 0.0})
    assert parse(tmp_path) == [{"step": 1, "loss": None, "mse": 0.0}]


def test_reopening_drops_later_lines_and_keeps_earlier_ones_byte_for_byte(tmp_path):
    writer = open_writer(tmp_path)
    for step in (10, 20, 30, 40):
        writer.write(step, {"loss": 1 / step}, {"images_per_second": step / 3})
    before = read(tmp_path)
    open_writer(tmp_path, start_step=20).write(30, {"loss": 9.0})
    kept = b"".join(before.splitlines(keepends=True)[:2])
    assert read(tmp_path) == kept + b'{"step": 30, "loss": 9.0}\n'
    open_writer(tmp_path)
    assert read(tmp_path) == b"", "a run that starts over keeps nothing"
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 2', "{", '{"loss": 0.5}'])
def test_reopening_drops_a_torn_line(tmp_path, torn):
    good = '{"step": 10,  "loss": 0.5}\n'  # spaced as we never do: kept as it stands
    (tmp_path / METRICS_FILE).write_text(good + torn)
    open_writer(tmp_path, start_step=1000).write(1010, {})
    assert read(tmp_path).decode() == good + '{"step": 1010}\n'


GOOD = [b'{"step": 10, "loss": 0.5}', b'{"step": 20, "loss": 0.25}', b'{"step": 30, "loss": 0.125}']


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 2\x10, "loss": 0.25}',  # one bit
        b'{"spep": 20, "loss": 0.25}',
        b'{"step": 20, "lo\xf3s": 0.25}',  # no UTF-8
        b'{"step": "20"}',
        b'{"step": true}',
        b'{"step": null}',
        b'{"step": 1e400}',
        b'{"step": NaN}',
        b"[20]",
        b"",
        b"\0" * 40,  # as a loss of power leaves it
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda line: repr(line[:24]),
)
def test_a_damaged_line_is_left_out_said_and_kept_beside(tmp_path, caplog, damaged):
    path, content = tmp_path / METRICS_FILE, b"\n".join([GOOD[0], damaged, GOOD[2], b""])
    path.write_bytes(content)
    writer = open_writer(tmp_path, start_step=30)
    writer.write(40, {"loss": 0.0})
    assert [line["step"] for line in parse(tmp_path)] == [10, 30, 40]
    assert read(tmp_path).startswith(GOOD[0] + b"\n" + GOOD[2] + b"\n")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 1 of 3 lines are damaged and left out",
        f"{path} is kept as {path}.damaged",
    ]
    assert path.with_name(path.name + ".damaged").read_bytes() == content


def test_a_second_damage_is_kept_beside_the_first(tmp_path):
    for number in range(2):
        (tmp_path / METRICS_FILE).write_bytes(b"%d\n" % number)
        open_writer(tmp_path)
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("*.damaged*"))]
    assert kept == [b"0\n", b"1\n"]


def make_folder(path):
    path.mkdir()
    (path / "mine").touch()


def make_loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_folder, make_loop])
def test_what_is_no_file_is_set_aside(tmp_path, caplog, make):
    make(tmp_path / METRICS_FILE)
    open_writer(tmp_path, start_step=30).write(40, {"loss": 0.5})
    assert [line["step"] for line in parse(tmp_path)] == [40]
    assert "cannot be read" in caplog.text and "is kept as" in caplog.text
    assert os.path.lexists(tmp_path / f"{METRICS_FILE}.damaged")


def test_a_folder_that_takes_no_files_costs_the_lines_and_a_loud_line(tmp_path, caplog, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / METRICS_FILE).write_bytes(b"damaged\n")
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refuse)
    writer = open_writer(tmp_path, start_step=30)
    writer.write(40, {"loss": 0.5})
    writer.write(50, {"loss": 0.5})
    assert caplog.text.count("cannot be written (Permission denied): its lines wait") == 1
    monkeypatch.undo()
    writer.write(60, {"loss": 0.5})
    assert [line["step"] for line in parse(tmp_path)] == [40, 50, 60]


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 10}')
    open_writer(tmp_path, start_step=10).write(20, {})
    assert [line["step"] for line in parse(tmp_path)] == [10, 20]
