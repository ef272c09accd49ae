"""Pictures that are not as annotated, damaged, absent or too large: mended or left out, counted, never in silence."""

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import same_tensors, stop_after

import detector.run
import detector.training_run
from detector.checkpoint import load_checkpoint
from detector.data.coco import load_coco
from detector.data.headers import settle_sizes
from detector.data.images import MAX_PIXELS, load_image, load_image_size, read_sizes
from detector.data.loader import EvalBatches, TransformedDataset, build_loader
from detector.data.shapes import generate_shapes
from detector.data.sources import DataConfig, build_dataset
from detector.data.transforms import EvalTransform
from detector.data.unreadable import Unreadable
from detector.data.voc import load_voc
from detector.run import Run
from detector.run_log import read_log
from detector.stop import Interrupted

CPU = torch.device("cpu")
BOX = [2, 4, 8, 10]  # x, y, width, height


def picture(width=40, height=30, number=0) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encode(picture(), "JPEG")
CUT = JPEG[: len(JPEG) // 2]


class Folder:
    """Pictures 000.jpg, 001.jpg, ... of 40x30 pixels with a box each, and their COCO JSON."""

    def __init__(self, root: Path, count: int = 40) -> None:
        self.root, self.sizes, self.boxes = root, [(40, 30)] * count, {}
        for number in range(count):
            picture(number=number).save(self.path(number))

    def path(self, number: int) -> Path:
        return self.root / f"{number:03d}.jpg"

    def read(self):
        size_keys = [dict(zip(("width", "height"), size, strict=True)) for size in self.sizes]
        images = [{"id": n, "file_name": f"{n:03d}.jpg", **size} for n, size in enumerate(size_keys)]
        annotations = [
            {"id": n, "image_id": n, "category_id": 1, "bbox": self.boxes.get(n, BOX)}
            for n in range(len(images))
        ]
        content = {
            "images": images,
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": annotations,
        }
        (self.root / "a.json").write_text(json.dumps(content))
        return load_coco(self.root, self.root / "a.json")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def box_of(dataset, image_id):
    row = dataset.image_ids.tolist().index(image_id)
    return dataset.target(row)["boxes"].tolist()


# Sizes, by headers


def test_a_sound_data_set_is_given_back_as_it_was(folder):
    dataset = folder.read()
    settled = settle_sizes(dataset, strict=True)
    for name, value in vars(dataset).items():
        assert np.array_equal(getattr(settled, name), value), name


def test_a_size_that_differs_by_a_pixel_clips_the_boxes_and_is_noted(folder):
    picture(40, 29).save(folder.path(3))
    picture(40, 29).save(folder.path(5))
    folder.boxes = {3: [2, 20, 8, 10], 5: [0, 29, 40, 1]}
    settled = settle_sizes(folder.read())
    assert settled.image_sizes[3].tolist() == [29, 40]
    assert box_of(settled, 3) == [[2, 20, 10, 29]] and settled.areas[3] == 72
    assert box_of(settled, 5) == []
    assert settled.problems == (f"{folder.path(5)} has a box that has no area, and is skipped",)
    assert settled.notes == (
        f"2 of 40 pictures differ from their annotations by a few pixels, and boxes are clipped; the first: "
        f"{folder.path(3)}: the picture is 40x29 (width x height), its annotations say 40x30",
    )
    assert settled.left_out == () and settled.image(3).shape == (29, 40, 3)
    assert len(settled.boxes) == 39 and box_of(settled, 6) == [[2, 4, 10, 14]]


@pytest.mark.parametrize(("size", "factor"), [((20, 15), 0.5), ((80, 60), 2), ((100, 75), 2.5)])
def test_a_size_of_an_exact_scale_scales_the_boxes_and_is_noted(folder, size, factor):
    picture(*size).save(folder.path(3))
    settled = settle_sizes(folder.read())
    assert box_of(settled, 3) == [[2 * factor, 4 * factor, 10 * factor, 14 * factor]]
    assert settled.areas[3] == 80 * factor**2
    assert settled.notes[0].startswith("1 of 40 pictures differ from their annotations by a factor")


@pytest.mark.parametrize(
    ("size", "said"),
    [((30, 40), "the two are swapped"), ((40, 20), "40x20"), ((60, 30), "60x30"), ((33, 40), "33x40")],
)
def test_swapped_sides_and_other_sizes_are_left_out_with_a_sentence_each(folder, size, said):
    picture(*size).save(folder.path(3))
    settled = settle_sizes(folder.read())
    assert len(settled) == 39 and 3 not in settled.image_ids
    (sentence,) = settled.left_out
    assert sentence.startswith(f"{folder.path(3)}: the picture is ") and said in sentence


@pytest.mark.parametrize(
    ("stated", "actual", "fate"),
    [
        ((416, 416), (416, 415), "clipped"),
        ((416, 415), (415, 416), "left out"),  # swapped before close
        ((1000, 800), (1009, 806), "clipped"),  # less than one part in a hundred, and no common factor
        ((1000, 800), (1009, 807), "scaled"),
        ((1000, 800), (1011, 800), "left out"),
        ((1023, 767), (512, 384), "scaled"),  # rounded
        ((0, 0), (123, 45), "unknown"),
    ],
)
def test_the_fate_of_a_size(folder, monkeypatch, stated, actual, fate):
    dataset = folder.read()
    dataset.image_sizes[3] = stated[::-1]
    found = dataset.image_sizes.copy()
    found[3] = actual[::-1]
    monkeypatch.setattr("detector.data.headers.read_sizes", lambda paths, max_pixels: (found, {}))
    settled = settle_sizes(dataset)
    assert len(settled) == (39 if fate == "left out" else 40)
    assert any(fate in note for note in settled.notes) == (fate in ("clipped", "scaled"))
    if fate != "left out":
        assert settled.image_sizes[3].tolist() == list(actual[::-1])


def test_missing_and_unreadable_pictures_are_left_out_with_a_sentence_each(folder):
    folder.path(3).unlink()
    folder.path(7).write_text("<html>not found</html>")
    settled = settle_sizes(folder.read())
    assert len(settled) == 38 and len(settled.boxes) == 38
    assert settled.left_out[0] == f"{folder.path(3)}: no such picture file"
    assert settled.left_out[1].startswith(f"{folder.path(7)}: not a picture")
    assert settled.subset([0]).left_out == settled.left_out


def test_more_than_a_twentieth_left_out_is_refused_with_the_first_ones(folder):
    for number in range(12):
        folder.path(number).unlink()
    with pytest.raises(
        ValueError, match=r"12 of 40 pictures cannot be used, and at most 5% .*\n  .*000\.jpg"
    ) as e:
        settle_sizes(folder.read())
    assert str(e.value).endswith("\n  and 2 more") and "009.jpg" in str(e.value)
    assert len(settle_sizes(folder.read(), max_left_out=0.3)) == 28


@pytest.mark.parametrize("change", ["pixel", "scale", "swapped", "missing"])
def test_strict_refuses_the_first(folder, change):
    sizes = {"pixel": (40, 29), "scale": (20, 15), "swapped": (30, 40)}
    for number in (3, 5):
        if change == "missing":
            folder.path(number).unlink()
        else:
            picture(*sizes[change]).save(folder.path(number))
    with pytest.raises(
        ValueError, match=r"003\.jpg: .*\(strict refuses any; 2 picture\(s\) are not as annotated\)"
    ):
        settle_sizes(folder.read(), strict=True)


def test_exif_turned_pictures_have_the_size_that_is_seen(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(30, 40).save(folder.path(3), exif=exif)
    settled = settle_sizes(folder.read(), strict=True)
    assert settled.image(3).shape == (30, 40, 3)


def test_a_recipe_settles_its_sizes_unless_only_annotations_are_used(folder):
    folder.read()
    folder.path(3).unlink()
    data = DataConfig(
        root=folder.root, train=[{"format": "coco", "images": ".", "annotations": "a.json"}], max_pixels=1200
    )
    assert len(build_dataset(data, "train")) == 39
    assert len(build_dataset(data, "train", check_pictures=False)) == 40
    with pytest.raises(ValueError, match=r"too large \(40x30 pixels; data.max_pixels is 1199\)"):
        build_dataset(data.model_copy(update={"max_pixels": 1199}), "train")


def test_a_voc_picture_that_is_absent_or_has_no_size_is_left_out(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for number in range(40):
        size = "" if number in (3, 4) else "<size><width>40</width><height>30</height></size>"
        xml = f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>"
        (tmp_path / f"Annotations/{number}.xml").write_text(xml)
        if number not in (3, 7):
            picture().save(tmp_path / f"JPEGImages/{number}.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text("\n".join(map(str, range(40))))
    settled = settle_sizes(load_voc(tmp_path, "train"))
    assert [Path(s.partition(":")[0]).name for s in settled.left_out] == ["3.jpg", "7.jpg"]
    assert settled.problems == () and len(settled.boxes) == 38


# Reading of headers


def test_sizes_are_read_in_threads_with_a_reason_where_they_cannot(folder):
    folder.path(3).write_bytes(b"")
    paths = [str(folder.path(n)) for n in range(40)] * 5
    sizes, reasons = read_sizes(paths)
    assert sizes.shape == (200, 2) and sizes[2].tolist() == [30, 40] and sizes[43].tolist() == [-1, -1]
    assert reasons == {row: f"{folder.path(3)}: the file is empty (0 bytes)" for row in range(3, 200, 40)}
    assert read_sizes([])[0].shape == (0, 2)


def test_a_size_is_read_from_the_header_alone(tmp_path):
    for kind, data in (("png", encode(picture(), "PNG")), ("jpg", JPEG), ("bmp", encode(picture(), "BMP"))):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(data[: len(data) // 2])
        assert load_image_size(path) == (30, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiffs_size_is_that_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.tiff", exif=exif)
    assert load_image(tmp_path / "a.tiff").shape[:2] == load_image_size(tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a\0b.jpg", "a\ud800b.jpg", "a" * 300])
def test_a_name_that_no_file_can_have_is_in_the_sentence(name):
    _, reasons = read_sizes([name])
    assert reasons[0].startswith(f"{name}: ")


def test_a_pipe_is_not_waited_for(tmp_path):

    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: a device or pipe, where a picture file is expected"):
        load_image_size(tmp_path / "a.jpg")


# Damage


def png(width, height, rows=b"", crc_change=0) -> bytes:
    def chunk(kind, data):
        crc = (zlib.crc32(kind + data) ^ crc_change) & 0xFFFFFFFF
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def with_bytes(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def jpeg_of_size(width, height) -> bytes:
    """A JPEG whose header claims another size."""
    start = JPEG.index(b"\xff\xc0") + 5
    return with_bytes(JPEG, start, struct.pack(">HH", height, width))


PNG = encode(picture(), "PNG")
TIFF = encode(picture(), "TIFF")
BMP = encode(picture(), "BMP")
WEBP = encode(picture(), "WEBP")
PROGRESSIVE = encode(picture(), "JPEG", progressive=True)
PALETTE = picture().convert("P")
BROKEN = {
    "no bytes": b"",
    "one byte": JPEG[:1],
    "cut in the header": JPEG[:40],
    "cut after the header": JPEG[:640],
    "cut in the middle": CUT,
    "cut before the end": JPEG[:-20],
    "zero bytes": bytes(1000),
    "wrong magic": b"\xff\xd9" + JPEG[2:],
    "text": b"this is no picture",
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n",
    "huge PNG": png(50_000, 50_000),
    "huge JPEG": jpeg_of_size(50_000, 50_000),
    "size without pixels": png(40, 30),
    "progressive cut": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "PNG with wrong checksums": png(40, 30, bytes(121 * 30), crc_change=1),
    "PNG with a damaged stream": with_bytes(PNG, len(PNG) // 2, bytes(40)),
    "PNG without width": png(0, 30),
    "BMP of negative width": with_bytes(BMP, 18, struct.pack("<i", -40)),
    "TIFF with offsets past its end": with_bytes(TIFF, 4, struct.pack("<I", 1 << 30)),
    "TIFF cut": TIFF[:-300],
    "WebP cut": WEBP[: len(WEBP) // 2],
    "32-bit grey": encode(Image.fromarray(np.full((30, 40), 1 << 20, np.int32)), "TIFF"),
}
SOUND = {
    "one pixel": encode(picture(1, 1), "PNG"),
    "16-bit grey": encode(Image.fromarray(np.full((30, 40), 999, np.uint16)), "PNG"),
    "CMYK": encode(picture().convert("CMYK"), "JPEG"),
    "palette with transparency": encode(PALETTE, "PNG", transparency=3),
    "animation": encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
    "corrupt EXIF": encode(picture(), "JPEG", exif=b"Exif\0\0 no TIFF header"),
    "corrupt colour profile": encode(picture(), "JPEG", icc_profile=b"no profile" * 9),
    "JPEG named .png": JPEG,
    "BMP that runs down": with_bytes(BMP, 22, struct.pack("<i", -30)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_a_sentence_with_its_name(tmp_path, name):
    path = tmp_path / "x.jpg"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"x\.jpg: ") as error:
        load_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SOUND)
def test_a_strange_picture_is_decoded_and_has_the_size_of_its_header(tmp_path, name):
    path = tmp_path / "x.jpg"
    path.write_bytes(SOUND[name])
    image = load_image(path)
    assert image.dtype == np.uint8 and image.shape == (*load_image_size(path), 3)


@pytest.mark.parametrize("name", BROKEN)
def test_the_good_neighbours_of_a_broken_picture_are_still_batched(tmp_path, name):
    folder = Folder(tmp_path, 24)
    folder.path(3).write_bytes(BROKEN[name])
    dataset = settle_sizes(folder.read())
    unreadable = Unreadable(len(dataset), "replaced")
    seen = batches_of(dataset, unreadable, epoch=0)
    ids = [target["image_id"] for _, target in seen]
    assert len(seen) == len(dataset) and set(range(24)) - set(ids) == {3}
    told = [*dataset.left_out, *unreadable.image_ids]
    assert len(told) == 1 and told[0].startswith(f"{folder.path(3)}: ")


def test_messages_say_what_is_wrong(tmp_path):
    def message(name):
        (tmp_path / "x").write_bytes(BROKEN[name])
        return _error(tmp_path / "x")

    assert message("LFS pointer").endswith("a Git LFS pointer to it; `git lfs pull` fetches the picture")
    assert "too large (Image size (2500000000 pixels) exceeds limit of 178956970 pixels" in message(
        "huge PNG"
    )
    assert message("32-bit grey").endswith("in 32 bits; 8-bit and 16-bit pictures are accepted")
    assert "not a picture in an accepted format, JPEG, PNG, " in message("PostScript")


def _error(path):
    with pytest.raises(ValueError) as error:
        load_image(path)
    return str(error.value)


def test_a_bomb_is_refused_by_its_header_and_a_large_picture_gives_no_warning(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(10_000, 10_000))  # Pillow warns at 89 million
    with warnings.catch_warnings(record=True) as caught:
        assert load_image_size(path) == (10_000, 10_000)
    assert not caught
    with pytest.raises(
        ValueError, match=r"x\.png: the picture is too large \(10000x10000 .*max_pixels is 1000"
    ):
        load_image(path, max_pixels=1000)
    with pytest.raises(ValueError, match="max_pixels"):
        DataConfig(max_pixels=MAX_PIXELS + 1)


# Failures on decoding


def batches_of(dataset, unreadable, epoch, num_workers=0, policy="replace"):
    """The samples of an epoch in batches of 4."""
    transformed = TransformedDataset(dataset, EvalTransform(30, 40), 0, policy)
    order = [[(epoch, i) for i in range(n, min(n + 4, len(dataset)))] for n in range(0, len(dataset), 4)]
    loader = build_loader(transformed, order, num_workers, False)
    return [pair for batch in unreadable.watch(loader) for pair in zip(*batch, strict=True)]


def test_a_picture_that_fails_is_replaced_whatever_the_number_of_workers(folder, capsys):
    for number in (3, 17):
        folder.path(number).write_bytes(CUT)
    dataset = settle_sizes(folder.read())
    assert len(dataset) == 40 and dataset.left_out == ()
    runs = []
    for num_workers in (0, 2):
        unreadable = Unreadable(40, "replaced by another")
        runs.append([s for epoch in (0, 1) for s in batches_of(dataset, unreadable, epoch, num_workers)])
        assert [s.split(": ")[0] for s in unreadable.image_ids] == [str(folder.path(n)) for n in (3, 17)]
    for (image, target), (other_image, other_target) in zip(*runs, strict=True):
        assert torch.equal(image, other_image) and torch.equal(target["boxes"], other_target["boxes"])
        assert {k: v for k, v in target.items() if not torch.is_tensor(v)} == {
            k: v for k, v in other_target.items() if not torch.is_tensor(v)
        }
    marked = [i for i, (_, target) in enumerate(runs[0]) if "unreadable" in target]
    assert marked == [3, 17, 43, 57]
    chosen = [runs[0][i][1]["image_id"] for i in marked]
    assert not {3, 17} & set(chosen) and chosen[:2] != chosen[2:]
    assert capsys.readouterr().out.count("replaced by another: ") == 4  # once a run and picture


def test_too_many_failures_stop_the_run_with_the_list(folder):
    for number in (3, 17, 20):
        folder.path(number).write_bytes(CUT)
    dataset = settle_sizes(folder.read())
    with pytest.raises(
        ValueError, match=r"^3 of 40 pictures cannot be used, .*\n.*003\.jpg: .*\n.*\n.*020\.jpg"
    ):
        batches_of(dataset, Unreadable(40, "replaced"), 0)


@pytest.mark.parametrize(
    ("num_processes", "damaged", "fails"), [(6, 10, False), (6, 60, True), (64, 40, False)]
)
def test_several_processes_judge_the_share_of_all_their_pictures(monkeypatch, num_processes, damaged, fails):
    """Of 1000 pictures so many are damaged, dealt out evenly: each process alone has seen a part of the pictures."""
    share = 1000 // num_processes
    monkeypatch.setattr("detector.processes.world_size", lambda: num_processes)
    counters = [Unreadable(1000, "left out") for _ in range(num_processes)]
    for number in range(damaged):
        counters[number % num_processes].count({f"{number}.jpg": number}, 0)
    for counter in counters:
        counter.count({}, share)
    others = [(counter.num_seen, counter.image_ids) for counter in counters]
    monkeypatch.setattr("detector.processes.gather", lambda own: others)
    if fails:
        with pytest.raises(
            ValueError, match=f"^{damaged} of {num_processes * share} pictures cannot be used"
        ):
            counters[0].collect()
        return
    counters[0].collect()
    assert len(counters[0].image_ids) == damaged and counters[0].num_seen == share * num_processes


@pytest.mark.parametrize(("num_seen", "fails"), [(10, True), (500, False)])
def test_one_process_of_several_judges_in_the_middle_of_a_pass_by_100_pictures_for_each(
    monkeypatch, num_seen, fails
):
    """6 of the first 100 pictures of one process say little where 64 processes see 6400: 321 of them say enough."""
    monkeypatch.setattr("detector.processes.world_size", lambda: 64)
    counter = Unreadable(118_287, "left out")
    failed = {f"{number}.jpg": number for number in range(321 if fails else 6)}
    if fails:
        with pytest.raises(ValueError, match="^321 of 6400 pictures"):
            counter.count(failed, num_seen)
    else:
        counter.count(failed, num_seen)


def test_a_pass_judges_by_its_own_failures_and_tells_each_once(capsys):
    counter, new = Unreadable(40, "left out"), []
    for epoch in range(4):
        counter.begin()
        counter.count({f"{epoch}.jpg": epoch, "bad.jpg": 39}, 40, new.append)
        counter.collect()
        assert set(counter.image_ids.values()) == {epoch, 39}
    assert new == ["0.jpg", "bad.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert capsys.readouterr().out.count("left out: ") == 5


def test_a_set_of_which_nothing_decodes_ends_in_a_sentence(tmp_path):
    folder = Folder(tmp_path, 2)
    for number in range(2):
        folder.path(number).write_bytes(CUT)
    with pytest.raises(ValueError, match=r"000\.jpg: .*; nor can the 2 tried in its place be read"):
        batches_of(folder.read(), Unreadable(2, "replaced"), 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_the_sentence_alone(folder, num_workers):
    folder.path(3).write_bytes(CUT)
    with pytest.raises(ValueError) as error:
        batches_of(folder.read(), Unreadable(40, ""), 0, num_workers, policy="raise")
    assert str(error.value).startswith(f"{folder.path(3)}: the picture is damaged or cut short (")
    assert "Traceback" not in str(error.value) and error.value.__cause__ is None


class Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, key):
        raise self.error


def test_a_workers_error_keeps_its_type_and_lines_and_a_bug_its_traceback():
    with pytest.raises(FileNotFoundError) as found:
        list(build_loader(Failing(FileNotFoundError("a:\n  b\nValue: c")), [[0]], 1, False))
    assert str(found.value) == "a:\n  b\nValue: c"
    with pytest.raises(KeyError, match="Traceback"):
        list(build_loader(Failing(KeyError("a")), [[0]], 1, False))


# Runs


@pytest.fixture
def shapes(tiny_config, tmp_path, monkeypatch):
    """Make so many pictures to train on, and to validate on: a recipe and their folder."""
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)
    root = tmp_path / "data"

    def make(count, *overrides):
        generate_shapes(root, num_train=count, num_val=count, image_size=64)
        sizes = [
            f"data.{split}.num_{each}={count}" for split in ("train", "val") for each in ("train", "val")
        ]
        return tiny_config(f"data.root={root}", *sizes, *overrides), root

    return make


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def test_a_run_goes_on_without_its_broken_pictures_and_says_so(shapes, tmp_path, capsys):
    config, root = shapes(20, "train.batch_size=10")
    (root / "train/000002.jpg").unlink()
    cut(root / "train/000005.jpg")
    (root / "val/000003.jpg").unlink()
    cut(root / "val/000007.jpg")
    run = Run(config, tmp_path / "run", CPU)
    run.train()
    out = capsys.readouterr().out
    assert f"  left out: {root}/train/000002.jpg: no such picture file" in out
    assert out.count("replaced by another: ") == 1 and out.count(f"left out: {root}/val/000007.jpg") == 1
    assert "(18 images, 2 unreadable left out, " in out
    log = read_log(tmp_path / "run/metrics.jsonl")
    assert [line["left_out"] for line in log if line["kind"] == "val"] == [2, 2]
    (line,) = [line for line in log if line["kind"] == "unreadable"]
    assert "000005.jpg: the picture is damaged" in line["message"] and line["epoch"] == 1
    assert {3, 7}.isdisjoint(run.evaluation.readable.image_ids.tolist())
    problems = (tmp_path / "run/problems.txt").read_text().splitlines()
    assert {p.partition(":")[0] for p in problems} == {"warning", "note", "train", "val"}
    assert sum(": no such picture file" in problem for problem in problems) == 2


def test_a_picture_that_fails_in_one_validation_alone_is_scored_in_the_next(shapes, tmp_path, monkeypatch):
    config, root = shapes(20, "train.batch_size=10", "train.epochs=3")
    run = Run(config, tmp_path / "run", CPU)
    read, failures = type(run.val_set).image, iter([OSError("Input/output error")])

    def image(dataset, index):
        if dataset.image_ids[index] == 8 and len(dataset) == 20 and dataset is run.evaluation.dataset:
            for error in failures:
                raise error
        return read(dataset, index)

    monkeypatch.setattr(type(run.val_set), "image", image)
    run.train()
    log = read_log(tmp_path / "run/metrics.jsonl")
    assert [line.get("left_out", 0) for line in log if line["kind"] == "val"] == [1, 0, 0]


def test_a_run_with_a_broken_picture_resumes_as_if_it_had_not_stopped(shapes, tmp_path, monkeypatch):
    config, root = shapes(4, "data.val=null")
    cut(root / "train/000003.jpg")
    Run(config, tmp_path / "whole", CPU).train()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            Run(config, tmp_path / "parts", CPU).train()
    Run(config, tmp_path / "parts", CPU, resume=True).train()
    weights = [load_checkpoint(tmp_path / n / "last.safetensors").state_dict for n in ("whole", "parts")]
    assert same_tensors(*weights)


def test_a_strict_run_stops_at_the_first_picture_that_fails(shapes, tmp_path):
    config, root = shapes(4)
    cut(root / "train/000003.jpg")
    data = config.data.model_copy(update={"strict": True})
    with pytest.raises(ValueError, match=r"000003\.jpg: the picture is damaged"):
        Run(config.model_copy(update={"data": data}), tmp_path / "run", CPU).train()


def test_an_evaluation_of_which_nothing_decodes_gives_no_result(folder):
    for number in range(40):
        folder.path(number).write_bytes(CUT)
    dataset = folder.read().subset([0, 1])
    transformed = TransformedDataset(dataset, EvalTransform(30, 40), 0, "drop")
    loader = build_loader(transformed, EvalBatches(dataset.aspect_ratios(), 2), 0, False)
    unreadable = Unreadable(2, "left out")
    assert list(unreadable.watch(loader)) == [] and sorted(unreadable.image_ids.values()) == [0, 1]
