"""Pictures of every kind arrive as upright 8-bit RGB, or as an error that names the file."""

import io
import shutil
import struct
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from detector.data.file_index import FileIndex
from detector.data.images import list_images, load_image, load_image_size
from detector.files import mark_output
from detector.inference import to_tensor


@pytest.fixture
def rgb() -> np.ndarray:
    """A smooth picture without symmetry: (24, 40, 3) uint8."""
    rows, columns = np.mgrid[0:24, 0:40]
    return np.stack([rows * 10, columns * 6, 255 - rows * 5 - columns * 3], axis=-1).astype(np.uint8)


def assert_is_rgb(image: np.ndarray, height: int, width: int) -> None:
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_files_give_their_pixels(tmp_path, rgb, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgb).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = load_image(path)
    assert_is_rgb(image, 24, 40)
    assert np.array_equal(image, rgb)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}])
def test_a_jpeg_decodes_as_pillow_decodes_it(tmp_path, rgb, options):
    path = tmp_path / "a.jpg"
    Image.fromarray(rgb).save(path, **options)
    image = load_image(path)
    assert_is_rgb(image, 24, 40)
    with Image.open(path) as picture:
        expected = np.asarray(picture).astype(int)
    assert np.abs(image - expected).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_is_repeated_in_three_channels(tmp_path, rgb, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgb[:, :, 0]).save(path, quality=95)
    image = load_image(path)
    assert_is_rgb(image, 24, 40)
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 1], image[..., 2])
    assert np.abs(image[..., 0].astype(int) - rgb[..., 0]).max() <= 6


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(4))])
def test_a_palette_is_looked_up_and_its_transparency_dropped(tmp_path, recwarn, transparency):
    colors = np.array([[200, 10, 30], [0, 255, 0], [1, 2, 3], [250, 240, 230]], np.uint8)
    indices = np.arange(4, dtype=np.uint8).reshape(2, 2)
    picture = Image.fromarray(indices, mode=None).convert("P")
    picture.putdata(indices.ravel().tolist())
    picture.putpalette(colors.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    picture.save(tmp_path / "a.png", **options)
    assert np.array_equal(load_image(tmp_path / "a.png"), colors[indices])
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGBA", "LA", "1"])
def test_alpha_is_dropped_and_bilevel_is_black_and_white(tmp_path, rgb, mode):
    picture = Image.fromarray(rgb)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(rgb[:, :, 0]))
        expected = rgb
    else:
        picture = picture.convert(mode)
        expected = np.asarray(picture.convert("L").convert("RGB"))
    picture.save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert_is_rgb(image, 24, 40)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize(("channels", "suffix"), [(1, "png"), (3, "png"), (4, "png"), (1, "tiff")])
def test_16_bits_are_scaled_to_8_not_clipped(tmp_path, rgb, channels, suffix):
    deep = rgb.astype(np.uint16) * 257  # 255 -> 65535
    stored = {1: deep[:, :, 0], 3: deep[:, :, ::-1], 4: np.dstack([deep[:, :, ::-1], deep[:, :, 0]])}[
        channels
    ]
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), stored)
    image = load_image(tmp_path / f"a.{suffix}")
    assert_is_rgb(image, 24, 40)
    assert np.array_equal(image, np.repeat(rgb[:, :, :1], 3, axis=2) if channels == 1 else rgb)


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
        np.array([[0, 70000]], np.int32),
        np.array([[-1, 7]], np.int32),
    ],
)
def test_floats_and_more_than_16_bits_are_refused_with_the_reason_by_path_and_by_pillow(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff: .*8-bit and 16-bit pictures are accepted"):
        load_image(tmp_path / "a.tiff")
    for picture in (Image.open(tmp_path / "a.tiff"), Image.fromarray(values)):
        with pytest.raises(ValueError, match="the PIL image: .*8-bit and 16-bit pictures are accepted"):
            to_tensor(picture)


def pixels_of(path: Path) -> np.ndarray:
    """(3, H, W) in 0..255, by way of Pillow's picture."""
    return to_tensor(Image.open(path)).mul(255).round().numpy()


def packed_tiff(values: np.ndarray) -> bytes:
    """A TIFF of 12 bits a sample: two samples in three bytes."""
    pairs = values.astype(int).reshape(-1, 2)
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    height, width = values.shape
    shorts = {258: 12, 259: 1, 262: 1, 277: 1}
    tags = shorts | {256: width, 257: height, 273: 122, 278: height, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 3 if tag in shorts else 4, 1, tags[tag]) for tag in sorted(tags)]
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4) + data


def save_deep(path: Path, values: np.ndarray, kind: str) -> None:
    """Save grey values (H, W) of 12 or 16 bits in one of the ways that people's programs do."""
    height, width = values.shape
    if kind == "12 of PGM":
        path.write_bytes(f"P5 {width} {height} 4095\n".encode() + values.astype(">u2").tobytes())
    elif kind == "12 of TIFF, packed":
        path.write_bytes(packed_tiff(values))
    else:
        tags = {"tiffinfo": {281: 4095}} if kind == "12 of TIFF, by its tag" else {}
        Image.fromarray(values.astype(np.int32 if kind == "16 in 32" else np.uint16)).save(path, **tags)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("12 of PGM", "a.pgm"),
        ("12 of TIFF, packed", "a.tiff"),
        ("12 of TIFF, by its tag", "a.tiff"),
        ("16", "a.tiff"),
        ("16", "a.png"),
        ("16 in 32", "a.tiff"),
    ],
)
def test_deep_grey_uses_the_range_that_its_file_states_by_path_and_by_pillow(tmp_path, recwarn, kind, name):
    top = 4095 if kind.startswith("12") else 65535
    values = np.linspace(0, top, 64 * 64).round().reshape(64, 64)
    save_deep(tmp_path / name, values, kind)
    image = load_image(tmp_path / name)
    assert np.abs(image[..., 0] - values / top * 255).max() <= 1
    assert np.array_equal(pixels_of(tmp_path / name), image.transpose(2, 0, 1))
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["grey.png", "grey.tiff", "colour.png", "tag of one picture.tiff"])
def test_where_few_levels_are_left_the_first_picture_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("detector.data.images._warned", [])
    values = np.linspace(0, 4000, 24 * 40).astype(np.uint16).reshape(24, 40)
    if kind.startswith("colour"):
        assert cv2.imwrite(str(tmp_path / kind), np.dstack([values] * 3))
    else:
        Image.fromarray(values).save(tmp_path / kind, **({"tiffinfo": {281: 4000}} if "tag" in kind else {}))
    with pytest.warns(UserWarning, match=rf"{kind}: 16 of 256 levels are left") as warned:
        image = load_image(tmp_path / kind)
        assert np.array_equal(image, load_image(tmp_path / kind)) and image.max() == 15
    assert len(warned) == 1


@pytest.mark.parametrize("values", [np.full((4, 4), 900), np.array([[0, 65535]]), np.array([[30000, 60000]])])
def test_deep_pictures_of_one_or_two_levels_that_stay_apart_are_no_warning(
    tmp_path, monkeypatch, recwarn, values
):
    monkeypatch.setattr("detector.data.images._warned", [])
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    load_image(tmp_path / "a.png")
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["CMYK", "CMYK without Adobe", "LA", "RGBA", "P", "1", "I;16"])
def test_pillows_picture_gives_what_its_file_gives(tmp_path, rgb, mode):
    path = tmp_path / ("a.jpg" if mode.startswith("CMYK") else "a.png")
    if mode == "I;16":
        Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(rgb).convert(mode.split()[0]).save(path)
    if mode == "CMYK without Adobe":
        ImageChops.invert(Image.open(path)).save(path)
        path.write_bytes(without_adobe_marker(path.read_bytes()))
    expected = load_image(path).transpose(2, 0, 1)
    assert np.array_equal(pixels_of(path), expected)
    assert 90 < expected.mean() < 165


INKS = [((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))]


@pytest.mark.parametrize(("ink", "color"), INKS)
def test_cmyk_jpegs_have_their_colours_with_and_without_adobes_inversion(tmp_path, ink, color):
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), ink).save(
        path, quality=100
    )  # Pillow writes Adobe's: inverted, with the marker
    assert np.abs(load_image(path).astype(int) - color).max() <= 3

    inverted = tuple(255 - value for value in ink)
    Image.new("CMYK", (16, 16), inverted).save(path, quality=100)
    path.write_bytes(without_adobe_marker(path.read_bytes()))
    with Image.open(path) as picture:
        assert picture.mode == "CMYK" and "adobe" not in picture.info
    assert np.abs(load_image(path).astype(int) - color).max() <= 3


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    assert data[start + 4 : start + 9] == b"Adobe"
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_every_exif_orientation_arrives_upright(tmp_path, rgb, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(path, exif=exif, subsampling=0, quality=100)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    image = load_image(path)
    assert_is_rgb(image, *expected.shape[:2])
    assert np.abs(image.astype(int) - expected).max() <= 2
    assert load_image_size(path) == expected.shape[:2]


def test_a_damaged_exif_block_leaves_the_picture_readable(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg", exif=b"Exif\0\0 not a TIFF header at all")
    assert_is_rgb(load_image(tmp_path / "a.jpg"), 24, 40)


def encoded(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_a_picture_cut_short_is_an_error_that_names_it(tmp_path, capfd, suffix, share):
    data = encoded(suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: "):
        load_image(path)
    assert capfd.readouterr().err == ""


def test_a_jpeg_with_bytes_after_its_end_is_whole(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("jpg"))
    (tmp_path / "b.jpg").write_bytes(encoded("jpg") + b"more" * 50)
    assert np.array_equal(load_image(tmp_path / "a.jpg"), load_image(tmp_path / "b.jpg"))


def test_files_that_are_no_pictures_are_named_with_what_they_are(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"empty\.jpg: the file is empty"):
        load_image(tmp_path / "empty.jpg")
    with pytest.raises(ValueError, match=r"page\.jpg: not a picture .* begin b'<html>"):
        load_image(tmp_path / "page.jpg")
    with pytest.raises(ValueError, match="a folder, where a picture file is expected"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such picture file"):
        load_image(tmp_path / "gone.jpg")


def test_the_greyscale_picture_of_coco128_becomes_rgb(shared):
    paths = list_images(shared / "data/coco128/images")
    grey = []
    for path in paths:
        with Image.open(path) as picture:
            grey += [path] if picture.mode == "L" else []
    assert len(paths) == 128 and grey
    image = load_image(grey[0])
    assert image.shape[2] == 3 and np.array_equal(image[..., 0], image[..., 2])


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "notes.txt", ".hidden.jpg", "[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names_of(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_folders_are_listed_deep_and_sorted_and_hidden_files_left_out(folder):
    assert names_of(list_images(folder), folder) == ["[1].jpg", "a.PNG", "b.jpg", "sub/c.jpeg"]


def test_files_and_patterns_keep_their_order_and_appear_once(folder):
    assert names_of(list_images([folder / "b.jpg", f"{folder}/*.*"]), folder) == ["b.jpg", "[1].jpg", "a.PNG"]
    assert names_of(list_images(f"{folder}/**/*.jpeg"), folder) == ["sub/c.jpeg"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(folder):
    assert names_of(list_images(folder / "[1].jpg"), folder) == ["[1].jpg"]


def test_links_to_folders_are_followed_once_and_links_to_nothing_are_told(folder, tmp_path_factory):
    listed = list_images(folder)
    (folder / "loop").symlink_to(folder)
    assert list_images(folder) == listed
    outside = tmp_path_factory.mktemp("outside")
    shutil.copy(listed[0], outside / "z.jpg")
    (folder / "linked").symlink_to(outside)
    (folder / "gone.png").symlink_to(outside / "gone.png")
    unreadable = []
    assert set(list_images(folder, unreadable)) == {*listed, folder / "linked" / "z.jpg"}
    assert unreadable == [f"{folder / 'gone.png'}: a link to nothing"]


SUFFIXES = {".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".avif": "AVIF",
            ".webp": "WEBP", ".tiff": "TIFF", ".pbm": "PPM", ".apng": "PNG", ".mpo": "JPEG"}  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whatever_is_decoded_when_it_is_named_is_found_in_a_folder(tmp_path, suffix):
    if SUFFIXES[suffix] not in Image.SAVE:
        pytest.skip(f"this Pillow has no {SUFFIXES[suffix]}")
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (8, 6), (200, 100, 50)).save(path, SUFFIXES[suffix])
    assert load_image(path).shape == (6, 8, 3) and list_images(tmp_path) == [path]


def test_files_that_are_no_pictures_are_counted_by_suffix(folder):
    for name in ("sub/clip.mp4", "LICENSE", "more.TXT"):
        (folder / name).touch()
    passed_over = Counter()
    list_images(folder, passed_over=passed_over)
    assert passed_over == {".txt": 2, ".mp4": 1, "without suffix": 1}


@pytest.mark.parametrize("mark", ["infer", "run"])
def test_folders_of_outputs_are_passed_over_unless_they_are_named(folder, mark):
    output = folder / "sub/found"
    mark_output(output) if mark == "infer" else output.mkdir()
    (output / ("c.jpg" if mark == "infer" else "training_state.pt")).touch()
    (output / "c.jpg").touch()
    passed_over = Counter()
    expected = ["[1].jpg", "a.PNG", "b.jpg", "sub/c.jpeg"]
    assert names_of(list_images(folder, passed_over=passed_over), folder) == expected
    assert passed_over["folders of outputs"] == 1
    assert "sub/found/c.jpg" not in names_of(list_images(f"{folder}/**/*.jpg"), folder)
    index = FileIndex(folder)
    assert index.pictures == expected and index.passed_over == {"folders of outputs": 1}
    assert list_images(output) == list_images(f"{output}/*.jpg") == [output / "c.jpg"]


def test_a_folder_that_holds_files_of_others_is_not_marked_as_outputs(folder):
    mark_output(folder / "sub")
    assert len(list_images(folder)) == 4


def test_a_path_that_names_nothing_is_an_error(folder):
    (folder / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such file or folder"):
        list_images([folder / "b.jpg", folder / "gone.jpg"])
    with pytest.raises(ValueError, match=r"\*\.gif: no picture found"):
        list_images(f"{folder}/*.gif")
    with pytest.raises(ValueError, match="bare: no picture found"):
        list_images(folder / "bare")
    with pytest.raises(ValueError, match="no path was given"):
        list_images([])
