"""Masks of annotations and of predictions in the image processors for instance segmentation."""

from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as coco_mask
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_piip import (
    PiipImageProcessor,
    PiipInstanceSegmentationImageProcessor,
    PiipInstanceSegmentationImageProcessorPil,
    PiipInstanceSegmentationOutput,
)
from modeling_piip.image_processing_piip_instance_segmentation import decode_segmentation, encode_rle, paste_mask


HEIGHT, WIDTH = 40, 60
POLYGON = [10.0, 5.0, 30.5, 8.0, 26.0, 31.0, 12.0, 25.5]
every_backend = pytest.mark.parametrize(
    "processor_class", [PiipInstanceSegmentationImageProcessor, PiipInstanceSegmentationImageProcessorPil]
)


def build_processor(processor_class=PiipInstanceSegmentationImageProcessor, **options):
    defaults = {"size": {"shortest_edge": 20, "longest_edge": 30}, "pad_size_divisor": 16}
    return processor_class(**(defaults | options))


def draw_blob() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return ((x - 25) ** 2 / 150 + (y - 20) ** 2 / 90 < 1) & ((x + y) % 7 > 0)


def annotate(*segmentations, **options) -> dict:
    objects = [
        {"bbox": [10, 5, 21, 26], "category_id": k, "segmentation": segmentation} | options
        for k, segmentation in enumerate(segmentations)
    ]
    return {"image_id": 17, "annotations": objects}


def image(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))


# Annotations


@pytest.mark.parametrize("compressed", [False, True])
def test_run_length_encodings_are_decoded_as_by_coco(compressed):
    expected = draw_blob()
    rle = coco_mask.encode(np.asfortranarray(expected.astype(np.uint8)))
    if not compressed:
        rle = encode_rle(torch.from_numpy(expected))
        reread = coco_mask.frPyObjects(rle, HEIGHT, WIDTH)
        np.testing.assert_array_equal(coco_mask.decode(reread), expected)
    np.testing.assert_array_equal(decode_segmentation(rle, HEIGHT, WIDTH, "object"), expected)


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.ones((3, 5), bool)], ids=["empty", "full"])
def test_encoding_of_uniform_masks(mask):
    rle = encode_rle(torch.from_numpy(mask))
    assert rle == {"size": [3, 5], "counts": [0, 15] if mask.all() else [15]}
    np.testing.assert_array_equal(decode_segmentation(rle, 3, 5, "object"), mask)


def test_polygons_are_filled_as_by_coco():
    star = [30 + r * np.array([np.cos(t), np.sin(t)]) for r, t in zip([25, 9] * 5, np.arange(10) * np.pi / 5)]
    polygons = [(np.concatenate(star) + 0.3).tolist(), [70.0, 2.5, 95.0, 2.5, 95.0, 55.0, 70.0, 55.0]]
    for parts in ([polygons[0]], [polygons[1]], polygons):
        found = decode_segmentation(parts, 64, 100, "object")
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, 64, 100))) > 0
        # the two may disagree about pixels that the outline cuts
        assert (found & expected).sum() / (found | expected).sum() > 0.95


def test_pixels_are_inside_if_their_centres_are():
    mask = decode_segmentation([[1.0, 1.0, 4.0, 1.0, 4.0, 3.4, 1.0, 3.4]], 5, 6, "object")
    expected = np.zeros((5, 6), dtype=bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(mask, expected)
    beyond = decode_segmentation([[-10.0, -10.0, 50.0, -10.0, 50.0, 50.0, -10.0, 50.0]], 5, 6, "object")
    assert beyond.all()


@every_backend
def test_masks_follow_the_image(processor_class):
    mask = draw_blob()
    annotations = [annotate([POLYGON], encode_rle(torch.from_numpy(mask))), annotate()]
    features = build_processor(processor_class)(
        [image(), image(WIDTH, HEIGHT)], annotations=annotations, return_tensors="pt"
    )
    assert features["pixel_values"].shape == (2, 3, 32, 32)
    masks, empty = (label["masks"] for label in features["labels"])
    assert masks.shape == (2, 32, 32) and empty.shape == (0, 32, 32)
    assert masks.dtype == torch.bool
    np.testing.assert_array_equal(masks[1, :20, :30], mask[1::2, 1::2])
    assert not masks[:, 20:].any() and not masks[:, :, 30:].any()
    assert abs(masks[0].sum() * 4 / decode_segmentation([POLYGON], HEIGHT, WIDTH, "").sum() - 1) < 0.1
    assert features["labels"][0]["class_labels"].tolist() == [0, 1]


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_masks_in_every_kind_of_array(return_tensors):
    features = build_processor(do_pad=False)(
        [image(), image()], annotations=[annotate([POLYGON])] * 2, return_tensors=return_tensors
    )
    for label in features["labels"]:
        assert label["masks"].shape == (1, 20, 30)


def test_boxes_are_taken_from_masks():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[10:20, 30:60] = True
    annotation = annotate(encode_rle(torch.from_numpy(mask)), encode_rle(torch.from_numpy(mask & False)), bbox=None)
    label = build_processor()(image(), annotations=annotation, return_tensors="pt")["labels"][0]
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.75, 0.375, 0.5, 0.25]]))
    assert label["masks"].sum() == mask.sum() / 4


def test_crowds_are_left_out_with_their_masks():
    annotation = annotate([POLYGON], [POLYGON])
    annotation["annotations"][0]["iscrowd"] = 1
    label = build_processor()(image(), annotations=annotation, return_tensors="pt")["labels"][0]
    assert label["class_labels"].tolist() == [1] and len(label["masks"]) == 1


def test_boxes_alone_give_no_masks():
    label = build_processor()(image(), annotations=annotate(None, []), return_tensors="pt")["labels"][0]
    assert len(label["boxes"]) == 2 and "masks" not in label


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1.0, 2.0, 3.0]], "broken polygon"),
        ([[1.0, 2.0, 3.0, 4.0, float("nan"), 1.0]], "broken polygon"),
        ([[1.0, 2.0, 3.0, 4.0]], "at least three corners"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, "x"]], "broken polygon"),
        ([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], "broken polygon"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "expected polygons"),
        ("polygon", "expected polygons"),
        ({"size": [30, 60], "counts": [1800]}, r"of the size \[30, 60\], but its image has \[40, 60\]"),
        ({"counts": [2400]}, "of the size None"),
        ({"size": [40, 60], "counts": [7]}, "with the sum 40 [*] 60"),
        ({"size": [40, 60], "counts": [-100, 2500]}, "with the sum 40 [*] 60"),
        ({"size": [40, 60], "counts": ["2400"]}, "with the sum 40 [*] 60"),
        ({"size": [40, 60], "counts": "PPY"}, "with the sum 40 [*] 60"),
        ({"size": [40, 60]}, "with the sum 40 [*] 60"),
    ],
)
def test_segmentations_that_cannot_be_used_are_named(segmentation, message):
    annotations = [annotate(), annotate([POLYGON], segmentation)]
    with pytest.raises(ValueError, match=rf"Annotation 1 \(image_id 17\): object 1 .*{message}"):
        build_processor()([image(), image()], annotations=annotations)


def test_one_object_without_mask_among_others_is_named():
    with pytest.raises(ValueError, match=r"Annotation 0 \(image_id 17\): object 1 has no 'segmentation'"):
        build_processor()(image(), annotations=annotate([POLYGON], None))


@pytest.mark.parametrize(
    "annotations", [["text"], [{"image_id": 1}], [{"image_id": 1, "annotations": ["x"]}], [annotate(), annotate()]]
)
def test_broken_annotations_are_refused_as_by_the_other_processor(annotations):
    with pytest.raises(ValueError) as expected:
        PiipImageProcessor(do_center_crop=False)(image(), annotations=annotations)
    with pytest.raises(ValueError) as error:
        build_processor()(image(), annotations=annotations)
    assert str(error.value) == str(expected.value)


# Predictions


def predictions() -> PiipInstanceSegmentationOutput:
    """Three detections and one row of padding: a square, one that it covers for the most part, one far away."""
    return PiipInstanceSegmentationOutput(
        scores=torch.tensor([[0.9, 0.8, 0.6, 0.0]]),
        class_ids=torch.tensor([[2, 1, 0, -1]]),
        pred_boxes=torch.tensor([[[0.3, 0.3, 0.4, 0.4], [0.35, 0.3, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2], [0, 0, 0, 0]]]),
        pred_masks=torch.full((1, 4, 28, 28), 5.0),
    )


def test_detections_above_the_threshold():
    (detection,) = build_processor().post_process_object_detection(predictions(), 0.7, [(100, 200)])
    assert detection["labels"].tolist() == [2, 1]
    torch.testing.assert_close(detection["boxes"][0], torch.tensor([20.0, 10.0, 100.0, 50.0]))
    (detection,) = build_processor().post_process_object_detection(predictions(), 0)
    assert len(detection["scores"]) == 3 and detection["boxes"].max() <= 1


def test_map_of_segment_ids_drops_what_is_covered():
    processor = build_processor()
    (result,) = processor.post_process_instance_segmentation(predictions(), target_sizes=[(100, 100)])
    assert [segment["label_id"] for segment in result["segments_info"]] == [2, 0]
    assert [segment["id"] for segment in result["segments_info"]] == [0, 1]
    segmentation = result["segmentation"]
    assert segmentation.unique().tolist() == [-1, 0, 1]
    assert (segmentation[10:50, 10:50] == 0).all() and (segmentation == 0).sum() == 1600
    (result,) = processor.post_process_instance_segmentation(
        predictions(), overlap_mask_area_threshold=0.1, target_sizes=[(100, 100)]
    )
    assert [segment["label_id"] for segment in result["segments_info"]] == [2, 1, 0]
    assert (result["segmentation"] == 1).sum() == 200


def test_binary_maps_and_encodings_overlap():
    processor, sizes = build_processor(), torch.tensor([[100, 120]])
    (binary,) = processor.post_process_instance_segmentation(
        predictions(), target_sizes=sizes, return_binary_maps=True
    )
    (encoded,) = processor.post_process_instance_segmentation(
        predictions(), target_sizes=sizes, return_coco_annotation=True
    )
    assert binary["segments_info"] == encoded["segments_info"]
    assert binary["segmentation"].shape == (3, 100, 120)
    for mask, rle in zip(binary["segmentation"], encoded["segmentation"], strict=True):
        np.testing.assert_array_equal(decode_segmentation(rle, 100, 120, ""), mask)


@pytest.mark.parametrize("options", [{}, {"return_binary_maps": True}, {"return_coco_annotation": True}])
def test_nothing_is_found(options):
    (result,) = build_processor().post_process_instance_segmentation(
        predictions(), threshold=0.95, target_sizes=[(6, 8)], **options
    )
    assert result["segments_info"] == []
    if not options:
        assert result["segmentation"].shape == (6, 8) and (result["segmentation"] == -1).all()
    else:
        assert len(result["segmentation"]) == 0


def test_pasting_a_part_equals_pasting_everywhere():
    """The reference computes the whole image, as the official code does on a GPU."""
    generator = torch.Generator().manual_seed(0)
    height, width = 37, 53
    for _ in range(20):
        mask = torch.rand(28, 28, generator=generator)
        corners = torch.rand(2, 2, generator=generator) * torch.tensor([width * 1.4, height * 1.4]) - 8
        box = torch.cat((corners.amin(0), corners.amax(0)))
        x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        expected = torch.nn.functional.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        place, values = paste_mask(mask, box, height, width)
        image = torch.zeros(height, width)
        image[place] = values
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("box", [[5.0, 5.0, 5.0, 9.0], [-9.0, -9.0, -3.0, -3.0], [90.0, 90.0, 99.0, 99.0]])
def test_boxes_without_pixels_paste_nothing(box):
    place, values = paste_mask(torch.ones(28, 28), torch.tensor(box), 20, 30)
    assert values.sum() == 0 and torch.zeros(20, 30)[place].shape == values.shape


class WholeImages(TorchDispatchMode):
    """How many tensors of the size of an image, in bytes of `num_pixels`, were alive at the same time."""

    def __init__(self, num_pixels: int):
        super().__init__()
        self.num_pixels = num_pixels
        self.tensors = WeakValueDictionary()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.num_pixels:
            self.tensors[id(result)] = result
        # views share their memory
        alive = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors.values()
        }
        self.most = max(self.most, sum(alive.values()) / self.num_pixels)
        return result


@pytest.mark.parametrize("options", [{}, {"return_coco_annotation": True}, {"return_binary_maps": True}])
def test_memory_does_not_grow_with_the_number_of_instances(options):
    generator = torch.Generator().manual_seed(0)
    number, (height, width) = 100, (500, 800)
    outputs = PiipInstanceSegmentationOutput(
        scores=torch.linspace(1, 0.1, number)[None],
        class_ids=torch.zeros(1, number, dtype=torch.long),
        pred_boxes=torch.rand(1, number, 4, generator=generator) * 0.4 + 0.1,
        pred_masks=torch.randn(1, number, 28, 28, generator=generator),
    )
    with WholeImages(height * width) as images:
        (result,) = build_processor().post_process_instance_segmentation(
            outputs, 0.0, 0.5, 0.0, target_sizes=[(height, width)], **options
        )
    assert len(result["segments_info"]) > 20
    # a byte per pixel of all masks, where they are the result; else the map of 32-bit ids and a mask or two
    assert images.most < 10 + (number if "return_binary_maps" in options else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass `target_sizes`"),
        ({"target_sizes": [(5, 5), (5, 5)]}, "2 `target_sizes` for 1 images"),
        (
            {"target_sizes": [(5, 5)], "return_binary_maps": True, "return_coco_annotation": True},
            "exclude each other",
        ),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_processor().post_process_instance_segmentation(predictions(), **options)


def test_model_without_masks_is_told():
    outputs = predictions()
    outputs["pred_masks"] = None
    with pytest.raises(ValueError, match="with_masks=False"):
        build_processor().post_process_instance_segmentation(outputs, target_sizes=[(5, 5)])


def test_processors_have_the_methods_of_their_tasks_only():
    # the pipelines ask for them by name
    assert not hasattr(PiipImageProcessor, "post_process_instance_segmentation")
    for processor_class in (PiipInstanceSegmentationImageProcessor, PiipInstanceSegmentationImageProcessorPil):
        assert not hasattr(processor_class, "post_process_semantic_segmentation")
        assert not hasattr(processor_class, "post_process_panoptic_segmentation")
