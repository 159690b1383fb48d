"""Segmentation maps in `PiipImageProcessor` and `PiipImageProcessorPil`, and maps from the output of the model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.modeling_outputs import SemanticSegmenterOutput

from modeling_piip import PiipImageProcessor, PiipImageProcessorPil


@pytest.fixture(params=[PiipImageProcessor, PiipImageProcessorPil], ids=["torchvision", "pil"])
def processor_class(request):
    return request.param


def class_ids(height=30, width=40, num_classes=200) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_classes, (height, width), dtype=np.uint8)


def picture(height=30, width=40) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


def get_labels(processor_class, segmentation_map, image=None, **options) -> torch.Tensor:
    options = {"do_resize": False, "do_center_crop": False} | options
    image = picture() if image is None else image
    return processor_class(**options)(image, segmentation_map, return_tensors="pt").labels


@pytest.mark.parametrize("size", [(60, 80), (15, 20), (64, 96), (7, 9)])
def test_maps_are_resized_to_the_nearest_pixel(processor_class, size):
    size = {"height": size[0], "width": size[1]}
    labels = get_labels(processor_class, class_ids(), do_resize=True, size=size)
    by_pillow = Image.fromarray(class_ids()).resize((size["width"], size["height"]), Image.Resampling.NEAREST)
    assert labels.dtype == torch.int64
    assert np.array_equal(labels[0].numpy(), np.array(by_pillow))


def test_maps_go_through_the_same_steps_as_images(processor_class):
    """A map that is also the picture: every class of the labels lies where its colour does."""
    blocks = np.arange(12, dtype=np.uint8).reshape(3, 4).repeat(50, 0).repeat(50, 1)
    processor = processor_class(
        size={"shortest_edge": 75}, crop_size={"height": 60, "width": 120}, resample=0, do_rescale=False
    )
    features = processor(
        np.stack([blocks] * 3, axis=-1),
        blocks,
        do_normalize=False,
        do_pad=True,
        pad_size_divisor=64,
        return_tensors="pt",
    )
    assert features.labels.shape == (1, 64, 128) and features.pixel_values.shape == (1, 3, 64, 128)
    left = (120 - 100) // 2
    inside = features.labels[0, :60, left : left + 100]
    assert torch.equal(inside, features.pixel_values[0, 0, :60, left : left + 100].long())
    outside = features.labels[0].clone()
    outside[:60, left : left + 100] = 255
    assert outside.eq(255).all()


def test_padding_of_a_batch_is_ignored(processor_class):
    processor = processor_class(do_resize=False, do_center_crop=False, do_pad=True, pad_size_divisor=32)
    maps = [class_ids(30, 40), class_ids(20, 50)]
    features = processor([picture(30, 40), picture(20, 50)], maps, return_tensors="pt")
    assert features.labels.shape == (2, 32, 64) and features.pixel_values.shape[2:] == (32, 64)
    for label, original in zip(features.labels, maps, strict=True):
        height, width = original.shape
        assert np.array_equal(label[:height, :width], original)
        assert label[height:].eq(255).all() and label[:, width:].eq(255).all()


def test_reduced_labels_count_from_the_first_class(processor_class):
    segmentation_map = np.zeros((30, 40), dtype=np.uint8)
    segmentation_map[0, :4] = [0, 1, 150, 255]
    labels = get_labels(processor_class, segmentation_map, do_reduce_labels=True)
    assert labels[0, 0, :4].tolist() == [255, 0, 149, 255]
    assert get_labels(processor_class, segmentation_map)[0, 0, :4].tolist() == [0, 1, 150, 255]


def test_reduction_can_be_asked_for_in_the_call(processor_class):
    processor = processor_class(do_resize=False, do_center_crop=False)
    labels = processor(picture(), np.ones((30, 40), dtype=int), do_reduce_labels=True, return_tensors="pt").labels
    assert labels.eq(0).all()


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda ids: Image.fromarray(ids).convert("I"),
        lambda ids: Image.fromarray(ids.astype(np.uint16)),
        torch.from_numpy,
        lambda ids: ids[None],
        lambda ids: [ids.astype(np.int32)],
    ],
    ids=["L", "I", "I;16", "tensor", "stack", "list"],
)
def test_every_kind_of_map_is_read(processor_class, convert):
    assert np.array_equal(get_labels(processor_class, convert(class_ids()))[0], class_ids())


def test_palette_files_count_by_their_indices(processor_class, tmp_path):
    image = Image.fromarray(class_ids())
    image = image.convert("P") if image.mode != "P" else image
    image.putpalette([(7 * k) % 256 for k in range(768)])
    image.save(tmp_path / "map.png")
    assert np.array_equal(get_labels(processor_class, tmp_path / "map.png")[0], np.array(image))


def test_ids_beyond_255_survive(processor_class):
    ids = class_ids().astype(np.int64) * 1000
    assert np.array_equal(get_labels(processor_class, ids)[0], ids)


def test_images_without_maps_have_no_labels(processor_class):
    assert "labels" not in processor_class()(picture(), return_tensors="pt")


def test_labels_have_the_array_type_of_the_backend(processor_class):
    features = processor_class()(picture(), class_ids())
    assert type(features["labels"][0]) is type(features["pixel_values"][0])


@pytest.mark.parametrize("segmentation_map", [class_ids(40, 30), class_ids(30, 41)], ids=["turned", "wider"])
def test_map_of_another_size_is_named(processor_class, segmentation_map):
    with pytest.raises(ValueError, match=r"Segmentation map 1 has \(height, width\) \(.*its image has \(30, 40\)"):
        get_labels(processor_class, [class_ids(), segmentation_map], image=[picture(), picture()])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK"])
def test_maps_of_colours_are_named(processor_class, mode, tmp_path):
    image = Image.new(mode, (40, 30))
    with pytest.raises(ValueError, match=f"Segmentation map 0 has the mode {mode}: expected one channel"):
        get_labels(processor_class, image)
    with pytest.raises(ValueError, match="Maps of colours must be converted to class ids"):
        get_labels(processor_class, np.array(image))


def test_maps_that_are_no_integers_are_named(processor_class):
    with pytest.raises(ValueError, match="Segmentation map 0 has shape.*float32: expected integer class ids"):
        get_labels(processor_class, class_ids().astype(np.float32))


def test_another_number_of_maps_is_refused(processor_class):
    with pytest.raises(ValueError, match="Got 1 segmentation maps for 2 images"):
        get_labels(processor_class, [class_ids()], image=[picture(), picture()])


def test_map_that_cannot_be_read_is_named(processor_class, tmp_path):
    (tmp_path / "map.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="Segmentation map 0, .*map.png.* cannot be read"):
        get_labels(processor_class, tmp_path / "map.png")


def test_images_of_one_pixel_are_processed(processor_class):
    processor = processor_class(size={"shortest_edge": 16, "longest_edge": 64}, do_center_crop=False)
    features = processor(Image.new("RGB", (1, 1)), class_ids(1, 1), return_tensors="pt")
    assert features.pixel_values.shape == (1, 3, 16, 16) and features.labels.shape == (1, 16, 16)
    features = processor(Image.new("RGB", (2000, 1)), class_ids(1, 2000), return_tensors="pt")
    assert features.pixel_values.shape == (1, 3, 1, 64) and features.labels.shape == (1, 1, 64)


# Maps from the output of the model


def random_output(*shape: int) -> SemanticSegmenterOutput:
    return SemanticSegmenterOutput(logits=torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_logits_are_resized_to_the_original_images(processor_class, as_tensor):
    outputs, sizes = random_output(2, 5, 16, 20), [(33, 41), (8, 10)]
    processor = processor_class()
    class_maps = processor.post_process_semantic_segmentation(outputs, torch.tensor(sizes) if as_tensor else sizes)
    for class_map, logits, size in zip(class_maps, outputs.logits, sizes, strict=True):
        expected = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        assert torch.equal(class_map, expected)


def test_half_precision_logits_are_resized_in_float32(processor_class):
    outputs = random_output(1, 5, 16, 20)
    outputs.logits = outputs.logits.bfloat16()
    (result,) = processor_class().post_process_semantic_segmentation(
        outputs, [(8, 9)], return_segmentation_scores=True
    )
    assert result.segmentation_scores.dtype == torch.float32


def test_padding_of_the_batch_is_cut_off(processor_class):
    """The second image is half as wide: it filled the left half of its logits."""
    processor = processor_class(
        size={"shortest_edge": 16, "longest_edge": 32}, do_center_crop=False, do_pad=True, pad_size_divisor=1
    )
    features = processor([picture(160, 320), picture(160, 160)], return_tensors="pt")
    assert features.pixel_values.shape == (2, 3, 16, 32)
    outputs = random_output(2, 5, 16, 32)
    class_maps = processor.post_process_semantic_segmentation(outputs, [(160, 320), (160, 160)])
    alone = SemanticSegmenterOutput(logits=outputs.logits[1:, :, :, :16])
    (expected,) = processor.post_process_semantic_segmentation(alone, [(160, 160)])
    assert class_maps[0].shape == (160, 320)
    assert torch.equal(class_maps[1], expected)


def test_semantic_processors_offer_no_masks_of_instances(processor_class):
    """The pipeline chooses the kind of segmentation by these methods."""
    for kind in ("instance", "panoptic"):
        assert not hasattr(processor_class, f"post_process_{kind}_segmentation")
