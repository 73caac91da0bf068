"""Charts: names stand near their lines' ends without covering each other, and look the same in every chart."""

import pytest

from benchmarks.charts import chart, colour_of, label_ends, log_axis, styles

pytest.importorskip("matplotlib")


def test_names_are_apart_in_the_order_of_their_lines_ends(tmp_path):
    path = tmp_path / "chart.png"
    ends = {
        "high": [(1.0, 10.0)],
        "b": [(1.0, 1.02)],
        "a": [(1.0, 1.01)],
        "c": [(1.0, 1.03)],
        "lost": [(1.0, float("nan"))],
    }
    with chart(str(path), "Title", [["one"]], 3) as panels:
        panel = panels["one"]
        for [(x, y)] in ends.values():
            panel.plot([0, x], [1.0, y])
        log_axis(panel, "y")
        panel.set_yticks([1, 10, 1000])  # beyond the data
        label_ends(panel, ends, {"c": "c, 1.03"})
    texts = sorted(panel.texts, key=lambda text: text.get_position()[1])
    assert [text.get_text() for text in texts] == ["a", "b", "c, 1.03", "high"]
    boxes = [text.get_window_extent() for text in texts]
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False))
    assert boxes[0].x0 > panel.bbox.x1  # right of the panel
    top = panel.transData.transform(ends["high"][0])[1]
    assert boxes[-1].y0 < top < boxes[-1].y1  # with room, at its line
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_name_has_its_colour_everywhere_and_dashes_where_another_has_it_too():
    shared = styles(["ternary", "eight_bit_no_adaln_norm", "full_precision"])
    assert shared["ternary"]["color"] == colour_of("eight_bit_no_adaln_norm")
    assert shared["ternary"]["linestyle"] != shared["eight_bit_no_adaln_norm"]["linestyle"]
    assert shared["full_precision"]["linestyle"] == "-"
