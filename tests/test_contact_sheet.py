import numpy as np

from terdit_jax.inference.contact_sheet import GAP, LINE, make_contact_sheet


def test_views_stand_side_by_side_above_their_captions():
    pictures = np.random.default_rng(0).integers(200, size=(6, 96, 96, 3), dtype=np.uint8)
    sheet = make_contact_sheet([pictures, pictures[:, :, ::-1]], ["7 cat: cat/1.png"] * 6)
    step_x, step_y = 2 * 97 - 1 + GAP, 96 + LINE + GAP
    columns = (sheet.shape[1] - GAP) // step_x
    assert sheet.dtype == np.uint8 and columns * ((sheet.shape[0] - GAP) // step_y) >= 6
    for i in range(6):
        left, top = GAP + i % columns * step_x, GAP + i // columns * step_y
        np.testing.assert_array_equal(sheet[top : top + 96, left : left + 96], pictures[i])
        np.testing.assert_array_equal(sheet[top : top + 96, left + 97 : left + 193], pictures[i, :, ::-1])
        caption = sheet[top + 96 : top + 96 + LINE, left : left + 193]
        assert (caption < 128).any() and (caption == 255).any()


def test_small_grey_pictures_are_enlarged_and_long_captions_stay_below_their_picture():
    pictures = np.full((4, 8, 8, 1), 9, np.uint8)
    sheet = make_contact_sheet([pictures], ["x" * 500] * 4)
    assert sheet.shape == (2 * (96 + LINE + GAP) + GAP, 2 * (96 + GAP) + GAP, 3)
    np.testing.assert_array_equal(sheet[GAP : GAP + 96, GAP : GAP + 96], 9)
    gaps = np.concatenate([sheet[:, :GAP], sheet[:, GAP + 96 : GAP + 96 + GAP]], axis=1)
    assert (gaps == 255).all()
