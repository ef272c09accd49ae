"""Drawings keep the picture's shape, stay inside it, and change it where they should."""

import numpy as np
import pytest
import torch
from matplotlib import get_data_path

import detector.visualize
from detector.visualize import _choose_place, class_color, draw_boxes, load_font, tile

CLASS_NAMES = ["cat", "dog"]


FONTS = f"{get_data_path()}/fonts/ttf"


@pytest.fixture
def fonts(monkeypatch):
    """Set the fonts that the system has."""
    found = []
    monkeypatch.setattr(detector.visualize, "_system_fonts", lambda: iter(found))
    detector.visualize._find_font.cache_clear()
    yield found
    detector.visualize._find_font.cache_clear()


def named(name, **options):
    return draw_boxes(grey(), [[40, 60, 120, 100]], [1], [name], **options)


@pytest.mark.parametrize("letters", ["éñß", "ЖЩЮ", "بعس", "ΩΨΣ"])
def test_letters_that_pillows_font_lacks_are_drawn_and_not_boxes(letters):
    drawn = [named(letter) for letter in letters]
    assert not any((a == b).all() for a, b in zip(drawn, drawn[1:] + drawn[:1], strict=True))


def test_names_in_ascii_keep_pillows_font_though_the_system_has_others(fonts):
    fonts.append(f"{FONTS}/DejaVuSerif.ttf")
    assert load_font("cat", 12).getname()[0] != "DejaVu Serif"


def test_of_the_systems_fonts_the_first_that_has_all_letters_is_taken(fonts, tmp_path, recwarn):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts += [str(tmp_path / "broken.ttf"), f"{FONTS}/cmr10.ttf"]
    fonts += [f"{FONTS}/{name}.ttf" for name in ("DejaVuSerif", "DejaVuSans", "DejaVuSansMono")]
    assert load_font("Жук", 12).getname()[0] == "DejaVu Serif"
    assert load_font("Жук بع", 12).getname()[0] == "DejaVu Sans"  # the serif has no Arabic
    assert not recwarn.list


def test_where_no_font_has_the_letters_it_is_said_once_and_the_others_are_drawn(fonts):
    fonts.append(f"{FONTS}/DejaVuSans.ttf")
    with pytest.warns(UserWarning, match="no letters for '中文' in .*--font or font_path") as warned:
        assert load_font("Жук 中文", 12).getname()[0] == "DejaVu Sans"
        named("Жук 中文"), named("Жук 中文")
    assert len(warned) == 1
    fonts.clear()
    with pytest.warns(UserWarning, match="no letters for '文' in the fonts of this system"):
        named("文")


def test_a_font_can_be_named(fonts):
    assert load_font("cat", 12, f"{FONTS}/DejaVuSerif.ttf").getname()[0] == "DejaVu Serif"
    assert not (named("cat", font_path=f"{FONTS}/DejaVuSerif.ttf") == named("cat")).all()
    with pytest.warns(UserWarning, match="no letters for 'Ж' in .*cmr10.ttf"):
        named("Ж", font_path=f"{FONTS}/cmr10.ttf")
    with pytest.raises(ValueError, match="absent.ttf: not a font that can be read"):
        named("cat", font_path="absent.ttf")


def grey(height: int = 120, width: int = 160, value: int = 127) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_drawing_is_a_new_picture_of_the_same_shape():
    image = grey()
    drawn = draw_boxes(image, [[20, 40, 90, 100]], [1], CLASS_NAMES, [0.9])
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (image == 127).all()
    assert drawn.flags.writeable and not np.shares_memory(drawn, image)


def test_line_lies_on_the_first_and_last_pixels_of_the_box():
    drawn = draw_boxes(grey(), [[20, 40, 90, 100]], [2], CLASS_NAMES)
    for row, column in ((60, 20), (60, 89), (99, 50)):  # pixels 20..89 and 40..99 are the box's
        assert tuple(drawn[row, column]) == class_color(2)
    assert (drawn[60, [19, 90]] == 127).all() and (drawn[100, 50] == 127).all()
    assert (drawn[60, 25:85] == 127).all()


def test_tag_is_drawn_above_the_box_in_its_colour_with_text():
    drawn = draw_boxes(grey(), [[20, 40, 90, 100]], [1], CLASS_NAMES, [0.9])
    tag = drawn[28:40, 21:45].reshape(-1, 3)
    assert (tag == class_color(1)).all(axis=1).any()
    assert (tag.min(axis=1) > 150).any()  # white letters with soft edges


@pytest.mark.parametrize(
    "box", [[0, 0, 160, 120], [150, 110, 160, 120], [0, 0, 3, 3], [-30, -30, 20, 500], [159.5, 0, 160, 1]]
)
def test_box_at_the_border_draws_its_tag_inside(box):
    drawn = draw_boxes(grey(), [box], [1], CLASS_NAMES, [0.5])
    assert drawn.shape == (120, 160, 3)
    assert (drawn == class_color(1)).all(axis=2).sum() > 100  # the tag's area


def test_no_box_changes_nothing():
    image = grey()
    assert (draw_boxes(image, np.empty((0, 4)), [], CLASS_NAMES, []) == image).all()
    assert (draw_boxes(image, [], [], CLASS_NAMES) == image).all()


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("label", range(1, 30))
def test_every_colour_shows_on_black_and_on_white(value, label):
    names = [str(i) for i in range(1, 30)]
    drawn = draw_boxes(grey(300, 400, value), [[50, 50, 300, 250]], [label], names)
    column = drawn[150, 50:55].astype(int)  # across the box's left line
    assert np.abs(column - value).max() > 100


@pytest.mark.parametrize("size", [(1, 1), (20, 30), (100, 100), (3000, 4000)])
def test_pictures_of_any_size_are_drawn(size):
    drawn = draw_boxes(grey(*size), [[0, 0, size[1], size[0]]], [1], ["a rather long class name"], [1.0])
    assert drawn.shape == (*size, 3)
    assert (drawn != 127).any()


def test_lines_grow_with_the_picture():
    small, large = (
        draw_boxes(grey(size, size), [[0.2 * size, 0.2 * size, 0.9 * size, 0.9 * size]], [1], CLASS_NAMES)
        for size in (100, 3000)
    )
    assert (small[60] == class_color(1)).all(axis=1).sum() == 2  # a pixel on either side
    assert (large[1800] == class_color(1)).all(axis=1).sum() == 20


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_tensors_are_drawn_as_arrays(dtype):
    image = grey(value=255)
    tensor = torch.ones(3, 120, 160, dtype=dtype) * (255 if dtype == torch.uint8 else 1)
    boxes, labels, scores = [[20, 40, 90, 100]], [1], [0.9]
    expected = draw_boxes(image, boxes, labels, CLASS_NAMES, scores)
    drawn = draw_boxes(
        tensor,
        torch.tensor(boxes),
        torch.tensor(labels),
        CLASS_NAMES,
        torch.tensor(scores, requires_grad=True),
    )
    assert drawn.shape == (120, 160, 3)
    assert (drawn[60] == expected[60]).all()


def test_equal_boxes_have_their_tags_apart():
    drawn = draw_boxes(grey(), [[40, 40, 120, 100]] * 2, [1, 2], CLASS_NAMES)
    for label in (1, 2):
        assert (drawn == class_color(label)).all(axis=2).sum() > 100


def test_tag_takes_the_place_that_covers_least():
    box, size, picture = np.array([40, 40, 120, 100]), (30, 10), (160, 120)
    above = (40, 30, 70, 40)
    assert _choose_place(box, size, picture, np.empty((0, 4))) == above
    assert _choose_place(box, size, picture, np.array([above])) == (90, 30, 120, 40)  # above, to the right


def test_colours_are_stable_and_different():
    assert class_color(1) == (242, 13, 13)
    assert len({class_color(label) for label in range(1, 366)}) == 365


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((grey(), [[1, 1, 5, 5]], [1, 2], CLASS_NAMES), "1 boxes, 2 labels; each box has one of each"),
        ((grey(), [[1, 1, 5, 5]], [1], CLASS_NAMES, []), "1 boxes, 1 labels, 0 scores"),
        ((grey(), [[1, 1, 5, 5]], [0], CLASS_NAMES), r"labels are 0..0; accepted are 1..2"),
        ((grey(), [[1, 1, 5, 5]], [3], CLASS_NAMES), r"labels are 3..3; accepted are 1..2"),
        ((grey()[..., 0], [], [], CLASS_NAMES), r"ndarray of shape \(120, 160\), uint8; accepted"),
        ((grey() / 255, [], [], CLASS_NAMES), r"float64; accepted are a \(H, W, 3\) uint8 array"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_boxes(*arguments)


def test_tile_lays_out_pictures_of_different_sizes():
    sheet = tile([grey(10, 20, 1), grey(20, 10, 2), grey(20, 20, 3)], columns=2, gap=4)
    assert sheet.shape == (44, 44, 3)
    assert (sheet[5:15, :20] == 1).all() and (sheet[:5, :20] == 255).all()  # centred in its cell
    assert (sheet[:20, 29:39] == 2).all()
    assert (sheet[24:, :20] == 3).all()
    assert (sheet[24:, 24:] == 255).all()


def test_tile_refuses_nothing_and_no_columns():
    with pytest.raises(ValueError, match="at least one picture"):
        tile([], 3)
    with pytest.raises(ValueError, match="columns is 0"):
        tile([grey()], 0)
