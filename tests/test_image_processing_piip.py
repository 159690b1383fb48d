# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Behaviour of `PiipImageProcessor` (torchvision) and `PiipImageProcessorPil`."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from modeling_piip.image_processing_piip import PiipImageProcessor
from modeling_piip.image_processing_pil_piip import PiipImageProcessorPil


PROCESSOR_CLASSES = [PiipImageProcessor, PiipImageProcessorPil]
AUTO_MAP = {
    "torchvision": "image_processing_piip.PiipImageProcessor",
    "pil": "image_processing_pil_piip.PiipImageProcessorPil",
}
# Only reads and converts: what comes out is the input as three channels from 0 to 255.
READ_ONLY = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


@pytest.fixture(params=PROCESSOR_CLASSES, ids=["torchvision", "pil"])
def processor_class(request):
    return request.param


def photo(height=300, width=400) -> np.ndarray:
    """A smooth picture with edges: (height, width, 3), uint8."""
    rows, columns = np.mgrid[:height, :width] / 50
    channels = [np.sin(rows + shift) * np.cos(columns * shift) + (columns > 3) for shift in (0.5, 1.0, 1.5)]
    return (np.stack(channels, axis=-1) * 60 + 100).astype(np.uint8)


def read(processor_class, image, **kwargs) -> torch.Tensor:
    return processor_class(**READ_ONLY)(image, return_tensors="pt", **kwargs).pixel_values


def truncated_file(path):
    Image.fromarray(photo()).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


# Size, crop, normalization, padding


@pytest.mark.parametrize("size", [(300, 400), (500, 451), (200, 200)])
def test_defaults_are_the_official_classification_evaluation(processor_class, size):
    image = Image.fromarray(photo(*size))
    official = transforms.Compose(
        [
            transforms.Resize(368, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(368),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    pixel_values = processor_class()(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 368, 368)
    assert pixel_values.dtype == torch.float32
    # Resizing tensors instead of PIL images moves single pixels by up to two of 255 steps.
    tolerance = 1e-6 if processor_class is PiipImageProcessorPil else 2 / 255 / 0.224 + 1e-3
    difference = (pixel_values[0] - official(image)).abs()
    assert difference.max() <= tolerance
    assert difference.mean() <= 1e-3


@pytest.mark.parametrize(
    "size, expected",
    [
        ({"shortest_edge": 30}, (30, 40)),
        (30, (30, 40)),
        ({"shortest_edge": 30, "longest_edge": 36}, (27, 36)),
        ({"height": 20, "width": 50}, (20, 50)),
    ],
)
def test_size_says_how_images_are_resized(processor_class, size, expected):
    image_processor = processor_class(size=size, do_center_crop=False)
    assert image_processor(photo(), return_tensors="pt").pixel_values.shape[-2:] == expected


@pytest.mark.parametrize(
    "padding, expected",
    [({}, (40, 50)), ({"pad_size_divisor": 32}, (64, 64)), ({"pad_size": {"height": 48, "width": 70}}, (48, 70))],
)
def test_padding_adds_zeros_at_the_right_and_bottom(processor_class, padding, expected):
    image_processor = processor_class(do_resize=False, do_center_crop=False, do_pad=True, **padding)
    pixel_values = image_processor([photo(40, 30), photo(20, 50)], return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, *expected)
    for image, (height, width) in zip(pixel_values, [(40, 30), (20, 50)], strict=True):
        assert image[:, height:].eq(0).all() and image[:, :, width:].eq(0).all()
        alone = processor_class(do_resize=False, do_center_crop=False)(photo(height, width), return_tensors="pt")
        torch.testing.assert_close(image[:, :height, :width], alone.pixel_values[0])


def test_padding_can_be_asked_for_in_the_call(processor_class):
    batch = processor_class(**READ_ONLY)([photo(40, 30)], do_pad=True, pad_size_divisor=32, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 64, 32)


def test_impossible_pad_size_divisor_is_refused(processor_class):
    with pytest.raises(ValueError, match="`pad_size_divisor` must be at least 1 pixel, got 0"):
        processor_class(do_pad=True)(photo(), pad_size_divisor=0)


@pytest.mark.parametrize("height, width", [(35, 30), (30, 61), (61, 99), (48, 48)])
def test_center_crop_is_that_of_torchvision(processor_class, height, width):
    image = Image.fromarray(photo(height, width))
    pixel_values = read(processor_class, image, do_center_crop=True, crop_size=48)
    assert torch.equal(pixel_values[0], transforms.PILToTensor()(transforms.CenterCrop(48)(image)))


def test_crop_size_without_height_and_width_is_refused(processor_class):
    with pytest.raises(ValueError, match="`crop_size` must have the keys 'height' and 'width', got {'shortest_edge'"):
        processor_class(crop_size={"shortest_edge": 48})(photo())


def test_both_backends_agree():
    images = [Image.fromarray(photo()), photo(401, 399), torch.from_numpy(photo(100, 90)).permute(2, 0, 1)]
    by_torchvision, by_pil = (cls()(images, return_tensors="pt").pixel_values for cls in PROCESSOR_CLASSES)
    torch.testing.assert_close(by_torchvision, by_pil, atol=0.1, rtol=1e-3)
    assert (by_torchvision - by_pil).abs().mean() < 5e-3


# Kinds of images


def test_grey_images_are_repeated_over_three_channels(processor_class):
    grey = photo()[..., 0]
    expected = torch.from_numpy(grey).expand(1, 3, -1, -1)
    for image in [Image.fromarray(grey), grey, grey[None], grey[..., None], torch.from_numpy(grey)[None]]:
        assert torch.equal(read(processor_class, image), expected)


def test_channels_last_is_inferred(processor_class):
    expected = torch.from_numpy(photo()).permute(2, 0, 1)[None]
    for image in [photo(), torch.from_numpy(photo()), photo().transpose(2, 0, 1), Image.fromarray(photo())]:
        assert torch.equal(read(processor_class, image), expected)


def test_transparency_is_laid_on_white(processor_class):
    rgba = np.dstack([photo(20, 30), np.zeros((20, 30), dtype=np.uint8)])
    rgba[:, 10:20, 3], rgba[:, 20:, 3] = 128, 255
    pixel_values = read(processor_class, Image.fromarray(rgba))[0].permute(1, 2, 0)
    assert pixel_values[:, :10].eq(255).all()
    assert pixel_values[:, 20:].equal(torch.from_numpy(rgba[:, 20:, :3]))
    half = rgba[:, 10:20, :3] * (128 / 255) + 127
    assert np.abs(pixel_values[:, 10:20].numpy() - half).max() <= 0.5

    for image in [rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba), rgba.astype(np.int64)]:
        assert torch.equal(read(processor_class, image)[0].permute(1, 2, 0).to(torch.uint8), pixel_values)
    as_float = read(processor_class, rgba / np.float32(255))[0].permute(1, 2, 0) * 255
    torch.testing.assert_close(as_float, pixel_values.float(), atol=0.51, rtol=0)


def test_palette_images_get_their_colours(processor_class):
    palette = Image.fromarray(photo()).quantize(16)
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)[None]
    assert palette.mode == "P"
    assert torch.equal(read(processor_class, palette), expected)

    palette.info["transparency"] = int(np.array(palette)[0, 0])
    assert read(processor_class, palette)[0, :, 0, 0].eq(255).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_images_keep_their_high_byte(processor_class, dtype):
    grey = (np.arange(200 * 300).reshape(200, 300)).astype(dtype)
    pixel_values = read(processor_class, Image.fromarray(grey))
    assert pixel_values.dtype == torch.uint8
    assert torch.equal(pixel_values[0], torch.from_numpy(grey // 256).to(torch.uint8).expand(3, -1, -1))


def test_8_bit_values_in_a_32_bit_image_are_kept(processor_class):
    grey = photo()[..., 0]
    assert torch.equal(read(processor_class, Image.fromarray(grey.astype(np.int32)))[0, 0], torch.from_numpy(grey))


def test_16_bit_files_are_read_alike_by_path_and_by_pil(processor_class, tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray((np.arange(200 * 300).reshape(200, 300)).astype(np.uint16)).save(path)
    by_path = read(processor_class, str(path))
    assert by_path.max() == 234
    assert torch.equal(by_path, read(processor_class, Image.open(path)))
    assert torch.equal(by_path, read(processor_class, path))


def test_paths_are_turned_upright(processor_class, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(30, 40)).save(tmp_path / "rotated.png", exif=exif)
    assert read(processor_class, str(tmp_path / "rotated.png")).shape == (1, 3, 40, 30)


def test_flipped_and_read_only_arrays_are_accepted(processor_class, recwarn):
    image = photo()
    image.setflags(write=False)
    assert torch.equal(read(processor_class, image[..., ::-1]), read(processor_class, image).flip(1))
    assert not [warning for warning in recwarn if "not writable" in str(warning.message)]


def test_nested_lists_and_stacks_become_one_batch(processor_class):
    stack = np.stack([photo(30, 40), photo(30, 40) // 2])
    expected = read(processor_class, list(stack))
    assert expected.shape == (2, 3, 30, 40)
    for images in [stack, torch.from_numpy(stack), [[stack[0]], [stack[1]]], [stack], tuple(stack)]:
        assert torch.equal(read(processor_class, images), expected)


def test_other_channel_counts_work_without_rgb_conversion(processor_class):
    image_processor = processor_class(do_resize=False, do_center_crop=False, do_convert_rgb=False)
    pixel_values = image_processor(
        torch.full((5, 20, 30), 255, dtype=torch.uint8),
        input_data_format="channels_first",
        image_mean=[0.5] * 5,
        image_std=[0.1, 0.2, 0.5, 1.0, 2.0],
        return_tensors="pt",
    ).pixel_values
    torch.testing.assert_close(pixel_values[0, :, 0, 0], torch.tensor([5.0, 2.5, 1.0, 0.5, 0.25]))


# Errors


@pytest.mark.parametrize("not_an_image", [{"image": 1}, 7, None, b"bytes"])
def test_what_is_no_image_is_named(processor_class, not_an_image):
    with pytest.raises(TypeError, match=f"Image 1 is a {type(not_an_image).__name__}: expected a PIL image"):
        processor_class()([photo(), not_an_image])


def test_a_string_that_is_no_path_is_named(processor_class):
    with pytest.raises(ValueError, match="Image 1, 'no/such/cat.png', cannot be read: it is no path, URL"):
        processor_class()([photo(), "no/such/cat.png"])


def test_arrays_of_objects_are_refused(processor_class):
    with pytest.raises(TypeError, match="Image 0 is an array of dtype object"):
        processor_class()(photo().astype(object))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_truncated_files_are_named(processor_class, tmp_path, suffix):
    path = truncated_file(tmp_path / f"cut.{suffix}")
    with pytest.raises(ValueError, match=f"Image 1, '.*cut.{suffix}', cannot be read: .* truncated"):
        processor_class()([photo(), str(path)])


def test_files_with_more_pixels_than_pillow_opens_are_named(processor_class, tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="Image 0, '.*huge.png', cannot be read: .* too large .*exceeds limit"):
        processor_class()(str(tmp_path / "huge.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_truncated_pil_images_are_named(processor_class, tmp_path, suffix):
    image = Image.open(truncated_file(tmp_path / f"cut.{suffix}"))
    with pytest.raises(ValueError, match="Image 1 is truncated or damaged .*LOAD_TRUNCATED_IMAGES"):
        processor_class()([photo(), image])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["numpy", "torch", "pil"])
def test_non_finite_pixels_are_refused(processor_class, value, kind):
    pixels = np.full((20, 30), 0.5, dtype=np.float32)
    pixels[3, 4] = value
    image = {"numpy": pixels, "torch": torch.from_numpy(pixels), "pil": Image.fromarray(pixels)}[kind]
    with pytest.raises(ValueError, match="Image 1 has NaN or infinite pixels. Replace them"):
        processor_class()([photo(), image])


@pytest.mark.parametrize("shape", [(2, 20, 30), (20, 30, 5), (1, 1, 3, 20, 30), (20,)])
def test_shapes_that_are_no_image_are_named(processor_class, shape):
    for image in [np.zeros(shape, dtype=np.uint8), torch.zeros(shape)]:
        with pytest.raises(ValueError) as error:
            processor_class()([photo(), image])
        assert str(error.value).startswith(f"Image 1 has shape {shape}: expected")


def test_wrong_channel_count_at_the_given_place_is_refused(processor_class):
    image = np.zeros((3, 20, 30), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"Image 0 has shape \(3, 20, 30\).* channels in the last dimension"):
        processor_class()(image, input_data_format="channels_last")


@pytest.mark.parametrize("batch", [[], (), [[], []], np.zeros((0, 3, 20, 30)), torch.zeros(0, 3, 20, 30)])
def test_empty_batches_are_refused(processor_class, batch):
    with pytest.raises(ValueError, match="empty batch"):
        processor_class()(batch)


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 5)), np.zeros((3, 0, 5)), torch.zeros(3, 5, 0)])
def test_images_without_pixels_are_refused(processor_class, image):
    with pytest.raises(ValueError, match="Image 1 is empty"):
        processor_class()([photo(), image])


def test_float_rgba_outside_0_to_1_is_refused(processor_class):
    with pytest.raises(ValueError, match="must be from 0 to 1, got 0 to 200: pass 0 to 255 as uint8"):
        processor_class()(np.linspace(0, 200, 4 * 20 * 30, dtype=np.float32).reshape(4, 20, 30))


# Saving and loading


def test_saved_folder_holds_the_code_of_both_backends(processor_class, tmp_path):
    processor_class(size={"shortest_edge": 32}, pad_size_divisor=8).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "image_processing_piip.py",
        "image_processing_pil_piip.py",
        "preprocessor_config.json",
    ]
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": AUTO_MAP}
    assert saved["image_processor_type"] == "PiipImageProcessor"

    for loaded in [cls.from_pretrained(tmp_path) for cls in PROCESSOR_CLASSES]:
        assert loaded.size == {"shortest_edge": 32}
        assert loaded.pad_size_divisor == 8


def test_subclasses_defined_elsewhere_are_saved_under_their_own_name(tmp_path, monkeypatch):
    (tmp_path / "my_processing.py").write_text(
        "from modeling_piip.image_processing_piip import PiipImageProcessor\n"
        "class MyImageProcessor(PiipImageProcessor):\n"
        "    size = {'shortest_edge': 64}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from my_processing import MyImageProcessor

    MyImageProcessor().save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "my_processing.MyImageProcessor"}


def run_without_the_package(script, folder, *arguments):
    script = 'import sys\nsys.modules["modeling_piip"] = None\n' + textwrap.dedent(script)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=folder, env=environment, check=True)


LOAD_AND_SAVE_TWICE = """
    import numpy as np
    from transformers import AutoImageProcessor

    image = np.load("image.npy")
    for backend in sys.argv[1:]:
        source = "saved"
        for target in [f"{backend}_1", f"{backend}_2"]:
            image_processor = AutoImageProcessor.from_pretrained(source, backend=backend, trust_remote_code=True)
            assert image_processor.backend == backend
            image_processor.save_pretrained(target)
            np.save(target + "/pixel_values.npy", image_processor(image, return_tensors="np").pixel_values)
            source = target
"""


@pytest.mark.parametrize(
    "saved_class, backends",
    [(PiipImageProcessor, ["torchvision", "pil"]), (PiipImageProcessorPil, ["pil", "torchvision"])],
)
def test_saved_folder_loads_where_the_package_is_missing(saved_class, backends, tmp_path):
    options = {"size": {"shortest_edge": 32}, "crop_size": 24}
    saved_class(**options).save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "image.npy", photo(40, 50))
    run_without_the_package(LOAD_AND_SAVE_TWICE, tmp_path, *backends)

    for backend in backends:
        loaded_class = PROCESSOR_CLASSES[list(AUTO_MAP).index(backend)]
        expected = loaded_class(**options)(photo(40, 50), return_tensors="np").pixel_values
        # The second folder was saved by the class that was loaded, as remote code, from the first.
        for folder in [tmp_path / f"{backend}_1", tmp_path / f"{backend}_2"]:
            saved = json.loads((folder / "preprocessor_config.json").read_text())
            assert saved["auto_map"] == {"AutoImageProcessor": AUTO_MAP}
            np.testing.assert_array_equal(np.load(folder / "pixel_values.npy"), expected)


# Not through AutoImageProcessor, which itself needs torchvision in the oldest supported Transformers.
LOAD_WITHOUT_TORCHVISION = """
    sys.modules["torchvision"] = None
    import numpy as np
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    pil_class = get_class_from_dynamic_module("image_processing_pil_piip.PiipImageProcessorPil", "saved")
    image_processor = pil_class.from_pretrained("saved")
    image_processor.save_pretrained("saved_again")
    assert image_processor(np.full((40, 50, 3), 255, np.uint8), return_tensors="pt").pixel_values.min() > 2

    torchvision_class = get_class_from_dynamic_module("image_processing_piip.PiipImageProcessor", "saved_again")
    try:
        torchvision_class()
    except ImportError as error:
        assert "PiipImageProcessor requires the Torchvision library" in str(error), error
    else:
        raise AssertionError("the torchvision backend was made without torchvision")
"""


def test_only_the_torchvision_backend_needs_torchvision(tmp_path):
    PiipImageProcessor().save_pretrained(tmp_path / "saved")
    run_without_the_package(LOAD_WITHOUT_TORCHVISION, tmp_path)


# Annotations and detections


DETECTION = {"size": {"shortest_edge": 60, "longest_edge": 100}, "do_center_crop": False, "do_pad": True}


def annotate(*objects: dict, image_id: int = 7) -> dict:
    return {"image_id": image_id, "annotations": list(objects)}


def test_objects_become_normalized_boxes(processor_class):
    annotations = [
        annotate(
            {"bbox": [20, 30, 40, 60], "category_id": 2},
            {"bbox": [0, 0, 400, 300], "category_id": 0, "area": 1200.0, "iscrowd": 0},
        ),
        annotate(image_id=8),
    ]
    images = [photo(300, 400), photo(200, 100)]
    inputs = processor_class(**DETECTION)(images, annotations=annotations, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 100, 80)
    first, second = inputs["labels"]
    assert first["class_labels"].tolist() == [2, 0] and first["class_labels"].dtype == torch.int64
    expected = [[40 / 400, 60 / 300, 40 / 400, 60 / 300], [0.5, 0.5, 1, 1]]
    torch.testing.assert_close(first["boxes"], torch.tensor(expected))
    # 300 x 400 pixels become 60 x 80
    torch.testing.assert_close(first["area"], torch.tensor([40 * 60 / 25, 1200 / 25]))
    assert first["iscrowd"].tolist() == [0, 0]
    assert first["image_id"].tolist() == [7] and second["image_id"].tolist() == [8]
    assert first["orig_size"].tolist() == [300, 400] and first["size"].tolist() == [60, 80]
    assert second["orig_size"].tolist() == [200, 100] and second["size"].tolist() == [100, 50]
    assert second["boxes"].shape == (0, 4) and second["class_labels"].shape == (0,)


def test_pixel_mask_tells_padding(processor_class):
    processor = processor_class(**DETECTION, pad_size_divisor=32)
    inputs = processor([photo(300, 400), photo(200, 100)], return_tensors="pt")
    assert inputs["pixel_mask"].shape == (2, 128, 96)
    for mask, (height, width) in zip(inputs["pixel_mask"], [(60, 80), (100, 50)], strict=True):
        assert mask[:height, :width].all() and mask.sum() == height * width
    assert "pixel_mask" not in processor(photo(), do_pad=False)


def test_labels_are_arrays_of_the_backend(processor_class):
    annotation = annotate({"bbox": [20, 30, 40, 60], "category_id": 2})
    processor = processor_class(**DETECTION)
    for options, expected in (
        ({}, torch.Tensor if processor.backend == "torchvision" else np.ndarray),
        ({"return_tensors": "np"}, np.ndarray),
        ({"return_tensors": "pt"}, torch.Tensor),
    ):
        (label,) = processor(photo(), annotations=annotation, **options)["labels"]
        assert {type(value) for value in label.values()} == {expected}


def test_boxes_come_back_from_resize_and_padding(processor_class):
    """The way there through the processor, the way back through its post-processing, for odd sizes."""
    random = np.random.default_rng(0)
    processor = processor_class(**DETECTION, pad_size_divisor=32)
    sizes = [(333, 500), (101, 613), (640, 427)]
    corners = [np.sort(random.uniform(0, 1, (5, 2, 2)), axis=1).reshape(5, 4) for _ in sizes]
    corners = [boxes * [width, height, width, height] for boxes, (height, width) in zip(corners, sizes, strict=True)]
    annotations = [
        annotate(*({"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": k} for k, (x1, y1, x2, y2) in enumerate(boxes)))
        for boxes in corners
    ]
    inputs = processor([photo(*size) for size in sizes], annotations=annotations, return_tensors="pt")
    outputs = SimpleNamespace(
        logits=torch.stack([torch.eye(5) * 20 - 10] * 3),
        pred_boxes=torch.stack([label["boxes"] for label in inputs["labels"]]),
    )
    for detection, boxes in zip(processor.post_process_object_detection(outputs, target_sizes=sizes), corners):
        order = detection["labels"].argsort()
        torch.testing.assert_close(detection["boxes"][order], torch.tensor(boxes).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size, expected", [((427, 640), (672, 1007)), ((333, 500), (672, 1009))])
def test_detection_sizes_are_rounded_as_in_the_official_code(processor_class, size, expected):
    processor = processor_class(size={"shortest_edge": 672, "longest_edge": 1120}, do_center_crop=False)
    assert processor(photo(*size), return_tensors="pt").pixel_values.shape[2:] == expected


def test_boxes_are_clipped_to_the_image(processor_class):
    annotation = annotate({"bbox": [-20, 250, 60, 90], "category_id": 1})
    (label,) = processor_class(**DETECTION)(photo(), annotations=annotation, return_tensors="pt")["labels"]
    torch.testing.assert_close(label["boxes"], torch.tensor([[20 / 400, 275 / 300, 40 / 400, 50 / 300]]))


def test_boxes_without_area_are_dropped_with_one_warning(processor_class, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        "modeling_piip.image_processing_piip.logger.warning", lambda text, *values: warnings.append(text % values)
    )
    annotations = [
        annotate({"bbox": [5, 5, 0, 10], "category_id": 0}, {"bbox": [5, 5, 10, 10], "category_id": 1}),
        annotate({"bbox": [500, 5, 10, 10], "category_id": 2}),
    ]
    inputs = processor_class(**DETECTION)([photo(), photo()], annotations=annotations, return_tensors="pt")
    assert [label["class_labels"].tolist() for label in inputs["labels"]] == [[1], []]
    assert warnings == ["Dropped 2 boxes without any area inside their image."]


def test_crowds_are_no_objects(processor_class):
    annotation = annotate(
        {"bbox": [5, 5, 9, 9], "category_id": 0, "iscrowd": 1}, {"bbox": [1, 1, 2, 2], "category_id": 1}
    )
    (label,) = processor_class(**DETECTION)(photo(), annotations=annotation, return_tensors="pt")["labels"]
    assert label["class_labels"].tolist() == [1]


@pytest.mark.parametrize(
    "annotations, message",
    [
        ([annotate(), annotate()], "Got 2 annotations for 1 images"),
        ([{"bbox": [1, 1, 2, 2], "category_id": 1}], "Annotation 0 must be a dictionary with 'image_id'"),
        ([{"image_id": "a", "annotations": []}], "Annotation 0 must be a dictionary with 'image_id', a whole number"),
        (annotate({"bbox": [1, 1, 2, 2]}), r"Annotation 0 \(image_id 7\): object 0 needs .* as 'category_id'"),
        (annotate({"bbox": [1, 1, 2, 2], "category_id": 1.5}), "whole number as 'category_id'"),
        (annotate({"bbox": [1, 1, 2], "category_id": 1}), r"has the bbox \[1.0, 1.0, 2.0\]"),
        (annotate({"bbox": "none", "category_id": 1}), "needs a 'bbox' of four numbers"),
        (annotate({"bbox": [9, 9, -3, 2], "category_id": 1}), "Convert corners"),
        (annotate({"bbox": [1, 1, float("nan"), 2], "category_id": 1}), "has the bbox"),
        (annotate({"bbox": [1, 1, 2, 2], "category_id": -1}), "category_id -1"),
    ],
    ids=[
        "count",
        "bare object",
        "image id",
        "no class",
        "half a class",
        "three",
        "text",
        "corners",
        "nan",
        "negative",
    ],
)
def test_broken_annotations_are_named(processor_class, annotations, message):
    with pytest.raises(ValueError, match=message):
        processor_class(**DETECTION)(photo(), annotations=annotations)


def test_annotations_need_whole_images_and_exclude_maps(processor_class):
    with pytest.raises(ValueError, match="set `do_center_crop=False`"):
        processor_class()(photo(), annotations=annotate())
    with pytest.raises(ValueError, match="pass one of them"):
        processor_class(**DETECTION)(photo(), segmentation_maps=np.zeros((300, 400), int), annotations=annotate())


def test_detections_are_the_best_pairs_of_query_and_class(processor_class):
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.6, 0.7]])
    outputs = SimpleNamespace(
        logits=torch.logit(scores)[None], pred_boxes=torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]]])
    )
    processor = processor_class()
    (detection,) = processor.post_process_object_detection(outputs, threshold=0.65, target_sizes=[(100, 200)])
    torch.testing.assert_close(detection["scores"], torch.tensor([0.9, 0.8, 0.7]))
    assert detection["labels"].tolist() == [0, 1, 2]
    # the last box is cut off at the border of the image
    expected = torch.tensor([[80.0, 30.0, 120.0, 70.0], [80.0, 30.0, 120.0, 70.0], [140.0, 0.0, 200.0, 30.0]])
    torch.testing.assert_close(detection["boxes"], expected)
    (detection,) = processor.post_process_object_detection(outputs, threshold=0.0, top_k=2)
    assert len(detection["scores"]) == 2 and detection["boxes"].max() <= 1
    (detection,) = processor.post_process_object_detection(outputs, threshold=0.95)
    assert detection["boxes"].shape == (0, 4)
    with pytest.raises(ValueError, match="Got 2 `target_sizes` for 1 images"):
        processor.post_process_object_detection(outputs, target_sizes=[(1, 1), (1, 1)])
