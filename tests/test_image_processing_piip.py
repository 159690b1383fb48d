# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Behaviour of `PiipImageProcessor` (torchvision) and `PiipImageProcessorPil`."""

import json
import os
import subprocess
import sys
import textwrap

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
