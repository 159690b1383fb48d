import json
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_piip import (
    PiipForObjectDetection,
    PiipImageProcessor,
    PiipInstanceSegmentationImageProcessor,
)
from modeling_piip.image_processing_piip_instance_segmentation import decode_segmentation
from modeling_piip.training import LossMeter, ModelArguments, OptimizationArguments, build_scheduler
from modeling_piip.training_detection import (
    DetectionAugmentationArguments,
    DetectionCollator,
    DetectionDataArguments,
    DetectionDataset,
    DetectionOptimizationArguments,
    build_detection_datasets,
    build_detection_previews,
    build_detection_transform,
    get_detections,
    load_detection_image_processor,
    load_object_detection_data,
)

from .common import build, tiny_config


# COCO ids have gaps; the list is not in their order
CATEGORIES = [{"id": 8, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 5, "name": "cow"}]
SIZE = (48, 32)  # width, height
POLYGON = [[4, 4, 20, 4, 20, 14, 4, 14]]


def make_annotation(number, image_id, bbox=(4, 4, 16, 10), category_id=5, **options):
    return {"id": number, "image_id": image_id, "bbox": list(bbox), "category_id": category_id} | options


def make_content(num_images=3, first_id=10):
    """A COCO file with two objects per image."""
    images = [
        {"id": first_id + k, "file_name": f"{k}.png", "width": SIZE[0], "height": SIZE[1]} for k in range(num_images)
    ]
    annotations = []
    for k in range(num_images):
        annotations.append(make_annotation(2 * k + 1, first_id + k, segmentation=POLYGON))
        annotations.append(
            make_annotation(
                2 * k + 2, first_id + k, bbox=(30, 2, 10, 20), category_id=3, segmentation=[[30, 2, 40, 2, 40, 22]]
            )
        )
    return {"images": images, "annotations": annotations, "categories": [dict(category) for category in CATEGORIES]}


def write_folder(root, change=None, split="validation"):
    """The splits "train" and "validation"; `change` may edit the content of one of them."""
    for name in ("train", "validation"):
        content = make_content()
        if change is not None and name == split:
            change(content)
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        for k in range(3):
            pixels = np.random.default_rng(k).integers(0, 256, (SIZE[1], SIZE[0], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"{k}.png")
        (root / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture(scope="module")
def image_processor():
    return PiipImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, do_center_crop=False, do_pad=True)


@pytest.fixture(scope="module")
def instance_processor():
    return PiipInstanceSegmentationImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, pad_size_divisor=32)


def load(folder, **kwargs):
    names = ("seed", "model_labels", "training", "with_masks")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    return load_object_detection_data(DetectionDataArguments(data_dir=str(folder), **kwargs), **options)


def objects_of(dataset, row=0):
    return json.loads(dataset[row]["objects"])


# Loading


def test_folder_gives_images_objects_and_classes_in_the_order_of_their_ids(folder):
    splits, label_names, category_ids = load(folder)
    assert label_names == ["cat", "cow", "dog"] and category_ids == [3, 5, 8]
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 3, "validation": 3}
    example = splits["validation"][1]
    assert example["image"]["path"] == str(folder / "images" / "validation" / "1.png")
    assert (example["image_id"], example["width"], example["height"]) == (11, *SIZE)
    first, second = objects_of(splits["validation"])
    assert (first["bbox"], first["category_id"], first["area"]) == ([4, 4, 16, 10], 1, 160)
    assert second["category_id"] == 0 and "segmentation" not in second
    assert objects_of(load(folder, with_masks=True)[0]["train"])[0]["segmentation"] == POLYGON


def test_classes_get_the_ids_of_the_checkpoint(folder):
    splits, label_names, category_ids = load(folder, model_labels=["dog", "cow", "cat"])
    assert label_names == ["dog", "cow", "cat"] and category_ids == [8, 5, 3]
    assert objects_of(splits["train"])[1]["category_id"] == 2
    # to evaluate, some of the classes of the checkpoint are enough
    _, label_names, category_ids = load(folder, model_labels=["cow", "pig", "cat", "dog"], training=False)
    assert label_names == ["cow", "pig", "cat", "dog"]
    assert category_ids[0] == 5 and len(set(category_ids)) == 4


def test_layout_of_coco_is_read(folder):
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        (folder / "images" / split).rename(folder / name)
        (folder / "annotations" / f"{split}.json").rename(folder / "annotations" / f"instances_{name}.json")
    (folder / "annotations" / "captions_train2017.json").write_text("not read")
    splits, _, _ = load(folder, train_split="train2017", eval_split="val2017")
    assert splits["train"][0]["image"]["path"] == str(folder / "train2017" / "0.png")
    assert len(splits["validation"]) == 3


def test_training_file_is_not_read_for_an_evaluation(folder):
    (folder / "annotations" / "train.json").write_text("damaged")
    assert load(folder, training=False)[0].keys() == {"validation"}


def test_only_the_first_split_to_evaluate_on_is_read(folder):
    # as COCO publishes it: images to test on, without annotations
    (folder / "annotations" / "test.json").write_text(json.dumps({"images": [], "categories": CATEGORIES}))
    assert load(folder)[0].keys() == {"train", "validation"}
    with pytest.raises(ValueError, match=r"test\.json is not in COCO format"):
        load(folder, eval_split="test")


def test_validation_images_are_held_out(folder):
    (folder / "annotations" / "validation.json").unlink()
    splits, _, _ = load(folder, train_val_split=0.34)
    assert (len(splits["train"]), len(splits["validation"])) == (1, 2)
    assert not set(splits["train"]["image_id"]) & set(splits["validation"]["image_id"])


def hub_rows(folder, as_columns, classes):
    rows = []
    for k in range(3):
        objects = [
            {"id": 2 * k, "bbox": [4.0, 4.0, 16.0, 10.0], "category": classes[1], "area": 100.0},
            {"id": 2 * k + 1, "bbox": [30.0, 2.0, 10.0, 20.0], "category": classes[0], "area": 150.0},
        ]
        if as_columns:
            objects = {key: [item[key] for item in objects] for key in objects[0]}
        rows.append({"image_id": 7 + k, "image": str(folder / "images" / "train" / f"{k}.png"), "objects": objects})
    return {key: [row[key] for row in rows] for key in rows[0]}


def hub_features(as_columns, category):
    fields = {
        "id": datasets.Value("int64"),
        "bbox": datasets.List(datasets.Value("float32"), length=4),
        "category": category,
        "area": datasets.Value("float64"),
    }
    objects = {key: datasets.List(value) for key, value in fields.items()} if as_columns else datasets.List(fields)
    return datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": objects})


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize("with_names", [True, False])
def test_objects_of_a_hub_data_set_are_read(folder, tmp_path_factory, as_columns, with_names):
    category = datasets.ClassLabel(names=["mask", "glove"]) if with_names else datasets.Value("int64")
    features = hub_features(as_columns, category)
    rows = hub_rows(folder, as_columns, classes=(0, 1) if with_names else (40, 7))
    dataset = datasets.Dataset.from_dict(rows, features=features)
    saved = tmp_path_factory.mktemp("hub")
    dataset.to_parquet(saved / "train.parquet")

    args = DetectionDataArguments(dataset_name=str(saved), train_val_split=0.34)
    splits, label_names, category_ids = load_object_detection_data(args)
    assert (label_names, category_ids) == ((["mask", "glove"], [0, 1]) if with_names else (["7", "40"], [7, 40]))
    example = splits["train"][0]
    assert (example["width"], example["height"]) == SIZE and example["image_id"] in (7, 8, 9)
    first, second = objects_of(splits["train"])
    assert first == {"bbox": [4, 4, 16, 10], "category_id": 1 if with_names else 0, "area": 100, "iscrowd": 0}
    assert second["category_id"] == (0 if with_names else 1)


def save_hub_data(root, rows):
    """The splits "train" and "validation" of a Hub data set whose classes are text."""
    features = hub_features(True, datasets.Value("string"))
    for split, columns in rows.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}.parquet")
    return DetectionDataArguments(dataset_name=str(root))


def test_classes_as_text_get_the_same_ids_in_all_splits(folder, tmp_path_factory):
    rows = {
        "train": hub_rows(folder, True, classes=("mask", "glove")),
        "validation": hub_rows(folder, True, classes=("mask", "mask")),
    }
    args = save_hub_data(tmp_path_factory.mktemp("hub"), rows)
    splits, label_names, category_ids = load_object_detection_data(args)
    assert (label_names, category_ids) == (["glove", "mask"], [0, 1])
    assert [item["category_id"] for item in objects_of(splits["train"])] == [0, 1]
    assert [item["category_id"] for item in objects_of(splits["validation"])] == [1, 1]
    # a checkpoint keeps its order
    splits, label_names, category_ids = load_object_detection_data(args, model_labels=["mask", "glove"])
    assert (label_names, category_ids) == (["mask", "glove"], [1, 0])
    assert [item["category_id"] for item in objects_of(splits["train"])] == [1, 0]


def test_class_as_text_that_no_training_object_has_is_named(folder, tmp_path_factory):
    rows = {
        "train": hub_rows(folder, True, classes=("mask", "glove")),
        "validation": hub_rows(folder, True, classes=("mask", "Glove")),
    }
    with pytest.raises(ValueError, match="classes without an object to train on: Glove. Both splits need the same"):
        load_object_detection_data(save_hub_data(tmp_path_factory.mktemp("hub"), rows))


def test_null_in_a_hub_data_set_is_nothing_or_named(folder, tmp_path_factory):
    rows = {"validation": hub_rows(folder, True, classes=("mask", "glove"))}
    objects = rows["validation"]["objects"]
    objects[0]["area"], objects[1] = None, None
    splits, _, _ = load_object_detection_data(save_hub_data(tmp_path_factory.mktemp("hub"), rows))
    assert [item["area"] for item in objects_of(splits["validation"])] == [160, 200]
    assert objects_of(splits["validation"], row=1) == []
    objects[2]["category"] = ["mask", None]
    args = save_hub_data(tmp_path_factory.mktemp("hub"), rows)
    with pytest.raises(ValueError, match="image_id 9: object 5 .*category_id"):
        load_object_detection_data(args)


def test_corners_as_boxes_and_other_names_of_columns_are_read(folder, tmp_path_factory):
    rows = hub_rows(folder, True, classes=(0, 1))
    rows["things"] = [objects | {"kind": objects.pop("category")} for objects in rows.pop("objects")]
    saved = tmp_path_factory.mktemp("hub")
    for objects in rows["things"]:
        objects["bbox"] = [[x, y, x + width, y + height] for x, y, width, height in objects["bbox"]]
    features = hub_features(True, datasets.ClassLabel(names=["mask", "glove"]))
    features["things"] = features.pop("objects")
    features["things"]["kind"] = features["things"].pop("category")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(saved / "train.parquet")
    options = {"dataset_name": str(saved), "objects_column_name": "things", "bbox_format": "xyxy"}
    splits, _, _ = load_object_detection_data(DetectionDataArguments(label_column_name="kind", **options))
    assert [item["bbox"] for item in objects_of(splits["train"])] == [[4, 4, 16, 10], [30, 2, 10, 20]]
    with pytest.raises(ValueError, match="holds id, bbox, area, kind: expected 'bbox' and the class"):
        load_object_detection_data(DetectionDataArguments(**options))
    with pytest.raises(ValueError, match="no column 'objects': choose --objects_column_name among image_id, image"):
        load_object_detection_data(DetectionDataArguments(dataset_name=str(saved)))


# Bad data


def set_value(kind, number, key, value):
    return lambda content: content[kind][number].update({key: value})


def remove_annotations(content):
    content["annotations"] = []


BAD_FILES = {
    "missing image": (
        set_value("images", 1, "file_name", "x.png"),
        r"1 of the 3 images .* missing.*validation/x\.png",
    ),
    "image id twice": (set_value("images", 1, "id", 10), "has the image id 10 twice"),
    "image id as text": (set_value("images", 1, "id", "10"), "image id '10': every image needs a whole number"),
    "annotation id twice": (set_value("annotations", 2, "id", 1), "has the annotation id 1 twice"),
    "category id twice": (set_value("categories", 0, "id", 3), "has the category id 3 twice"),
    "annotation without image": (
        set_value("annotations", 2, "image_id", 99),
        r"Annotation 3 in .*validation\.json belongs to image_id 99, but there is no such image",
    ),
    "unknown class": (
        set_value("annotations", 2, "category_id", 4),
        "Annotation 3 .* has the category_id 4, but the categories are 3, 5, 8",
    ),
    "negative size": (
        set_value("annotations", 2, "bbox", [4, 4, -16, 10]),
        r"validation split, image_id 11: object .* has the bbox \[4.0, 4.0, -16.0, 10.0\]",
    ),
    "box of three numbers": (
        set_value("annotations", 2, "bbox", [4, 4, 16]),
        r"image_id 11: object .* bbox \[4.0, 4.0, 16.0\]",
    ),
    "box without numbers": (set_value("annotations", 2, "bbox", ["a"]), "image_id 11: object .* four numbers"),
    "no objects": (remove_annotations, "validation split has 3 images and no annotated objects"),
    "no categories": (lambda content: content.pop("categories"), r"validation\.json is not in COCO format"),
    "images that are no list": (lambda content: content.update(images={"1": {}}), "needs lists of 'images'"),
    "other categories": (
        lambda content: content["categories"][2].update(name="pig"),
        r"validation\.json has other categories than .*train\.json",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_annotations_are_named(tmp_path, change, message):
    write_folder(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_folder_without_annotations_or_images_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match="no annotations of a split named train2017 or validation or test. Expected"):
        load(tmp_path / "nowhere", train_split="train2017")
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(ValueError, match="images/train nor .*train is a folder. Expected"):
        load(folder)


def test_boxes_are_clipped_and_those_without_area_dropped_with_one_warning(tmp_path, caplog):
    def change(content):
        boxes = [[-5, -5, 10, 10], [40, 20, 100, 5], [50, 2, 5, 5], [3, 3, 0, 5], [-9, 0, 9, 9]]
        for annotation, box in zip(content["annotations"], boxes):
            annotation["bbox"] = box

    with caplog.at_level(logging.WARNING):
        splits, _, _ = load(write_folder(tmp_path, change))
    assert [item["bbox"] for item in objects_of(splits["validation"])] == [[0, 0, 5, 5], [40, 20, 8, 5]]
    assert objects_of(splits["validation"], 1) == [] and len(objects_of(splits["validation"], 2)) == 1
    warnings = [record.message for record in caplog.records if "dropped" in record.message]
    assert warnings == ["The validation split: dropped 3 boxes without any area inside their image."]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3]], "broken polygon"),
        (
            {"size": [8, 8], "counts": [64]},
            r"image_id 10: object 1 has .* size \[8, 8\], but its image has \[32, 48\]",
        ),
        (None, "image_id 10: object 1 has no 'segmentation'"),
    ],
)
def test_bad_masks_are_named(tmp_path, segmentation, message):
    write_folder(tmp_path, set_value("annotations", 0, "segmentation", segmentation))
    load(tmp_path)  # boxes alone do not need them
    with pytest.raises(ValueError, match=message):
        load(tmp_path, with_masks=True)


def test_null_in_an_annotation_is_what_a_missing_value_is(tmp_path):
    write_folder(tmp_path, lambda content: content["annotations"][0].update(area=None, iscrowd=None, bbox=None))
    first = objects_of(load(tmp_path)[0]["validation"])[0]
    assert first == {"bbox": [4, 4, 16, 10], "category_id": 1, "area": 160, "iscrowd": 0}


def test_objects_without_a_box_get_that_of_their_mask(tmp_path):
    write_folder(tmp_path, lambda content: content["annotations"][0].pop("bbox"))
    splits, _, _ = load(tmp_path)
    assert objects_of(splits["validation"])[0]["bbox"] == [4, 4, 16, 10]


@pytest.mark.parametrize("check_data", [True, False])
def test_objects_without_an_area_get_that_of_what_is_evaluated(folder, check_data):
    # the mask of the second object is a triangle
    areas = [item["area"] for item in objects_of(load(folder, check_data=check_data)[0]["validation"])]
    assert areas == [160, 200]
    splits, _, _ = load(folder, check_data=check_data, with_masks=True)
    objects = objects_of(splits["validation"])
    assert [item["area"] for item in objects] == [
        decode_segmentation(item["segmentation"], *SIZE[::-1], "mask").sum() for item in objects
    ]
    assert objects[1]["area"] < 120


@pytest.mark.parametrize("with_masks", [False, True])
def test_damaged_image_of_unknown_size_has_no_objects_and_stops_nobody(tmp_path, with_masks, caplog):
    def forget_size(content):
        content["images"][0].update(height=None, width=None)
        mask = {"size": list(SIZE[::-1]), "counts": [SIZE[0] * SIZE[1]]}
        content["annotations"][0]["segmentation"] = mask

    write_folder(tmp_path, forget_size)
    (tmp_path / "images" / "validation" / "0.png").write_bytes(b"damaged")
    splits, _, _ = load(tmp_path, with_masks=with_masks)
    counts = [len(objects_of(splits["validation"], row)) for row in range(len(splits["validation"]))]
    assert counts[0] == 0 < max(counts)
    assert "without any area" not in caplog.text


def test_image_of_another_size_and_damaged_files_are_named_or_skipped(folder, image_processor):
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / "train" / "1.png")
    splits, _, _ = load(folder)
    args = (tiny_config(), DetectionDataArguments(data_dir=str(folder)), DetectionAugmentationArguments(), 0)
    with pytest.raises(ValueError, match=r"train/1\.png .* \(32, 48\), but its annotation says \(48, 32\)"):
        build_detection_datasets(splits, image_processor, *args)
    (folder / "images" / "train" / "1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"Cannot read the image .*train/1\.png"):
        build_detection_datasets(splits, image_processor, *args)
    args[1].skip_unreadable = True
    train, _ = build_detection_datasets(splits, image_processor, *args)
    assert [train[k]["labels"]["image_id"].item() for k in range(len(train))] == [10, 12]


# Augmentation


def rectangle_dataset(folder, image_processor, seed, transform, num_images=1):
    """Black images with a bright rectangle per object."""
    rng = np.random.default_rng(0)
    rows = {"image": [], "image_id": [], "height": [], "width": [], "objects": []}
    for k in range(num_images):
        height, width = (int(side) for side in rng.integers(60, 120, 2))
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        objects = []
        for class_id in range(3):
            left, top = (int(start) for start in rng.integers(0, (width - 24, height - 24)))
            # red, green and blue; later ones may hide earlier ones, so each has its own channel
            pixels[top : top + 24, left : left + 16, class_id] = 255
            polygon = [left, top, left + 16, top, left + 16, top + 24, left, top + 24]
            objects.append({"bbox": [left, top, 16, 24], "category_id": class_id, "area": 384.0, "iscrowd": 0})
            objects[-1]["segmentation"] = [polygon]
        Image.fromarray(pixels).save(folder / f"{k}.png")
        for key, value in zip(rows, (str(folder / f"{k}.png"), k, height, width, json.dumps(objects))):
            rows[key].append(value)
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    return DetectionDataset(dataset, image_processor, transform, seed)


POLICIES = {
    "official": {},
    "resize only": {"crop_prob": 0.0},
    "crop always": {"crop_prob": 1.0, "crop_range": [0.5, 0.9]},
    "large-scale jitter": {"large_scale_jitter": [0.3, 2.0]},
}


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_boxes_and_masks_stay_on_their_objects(tmp_path, options):
    processor = PiipInstanceSegmentationImageProcessor(
        size={"shortest_edge": 96, "longest_edge": 160}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    transform = build_detection_transform(DetectionAugmentationArguments(**options), processor, image_size=128)
    dataset = rectangle_dataset(tmp_path, processor, 0, transform, num_images=12)
    num_objects, flips = 0, set()
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            example = dataset[index]
            pixels, label = example["pixel_values"], example["labels"]
            height, width = pixels.shape[1:]
            assert max(height, width) <= 128
            assert label["masks"].shape == (len(label["boxes"]), height, width) and label["masks"].dtype == torch.bool
            for box, class_id, mask in zip(label["boxes"], label["class_labels"].tolist(), label["masks"]):
                bright = pixels[class_id] > 0.5
                found = bright.nonzero()
                if len(found) == 0:  # a sliver at the border
                    assert min(box[2] * width, box[3] * height) < 2
                    continue
                (top, left), (bottom, right) = found.amin(0).tolist(), (found.amax(0) + 1).tolist()
                expected = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
                torch.testing.assert_close(
                    box * torch.tensor([width, height, width, height]), expected.float(), atol=1.01, rtol=0
                )
                # the border of a resized mask may be a pixel off, which a second resize may double
                perimeter = 2 * (bottom - top + right - left)
                assert (mask != bright).sum() <= 2 * perimeter
                num_objects += 1
            flips.add(bool(label["boxes"][0, 0] > 0.5) if len(label["boxes"]) else None)
    assert num_objects > 30 and {True, False} <= flips


def test_sizes_are_those_of_the_official_policy(tmp_path):
    """1792 of PIIP-SBL: 11 sizes from 840 to 1400, in the other half after a crop; never more than 1792."""
    processor = PiipImageProcessor(size={"shortest_edge": 1400, "longest_edge": 2332}, do_center_crop=False)
    _, policy, last_crop, *_ = build_detection_transform(
        DetectionAugmentationArguments(), processor, image_size=1792
    ).transforms
    resize, crop = policy.transforms
    assert policy.p == [0.5, 0.5] and last_crop.range == (1792, 1792)
    official = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert resize.min_size == [int(side * 1.75) for side in official] and resize.max_size == 2332
    first, cut, second = crop.transforms
    assert first.min_size == [int(side * 1.75) for side in (400, 500, 600)]
    assert cut.range == (int(384 * 1.75), int(600 * 1.75)) and second.min_size == resize.min_size


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path, image_processor):
    transform = build_detection_transform(DetectionAugmentationArguments(), image_processor, image_size=48)

    def draw(seed, epoch, index):
        dataset = rectangle_dataset(tmp_path, image_processor, seed, transform, num_images=3)
        dataset.set_epoch(epoch)
        torch.manual_seed(int(torch.randint(1000, ())))
        return dataset[index]["pixel_values"]

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 1)):
        assert draw(*other).shape != draw(0, 1, 2).shape or not torch.equal(draw(*other), draw(0, 1, 2))


def test_image_without_objects_goes_through_the_augmentation(tmp_path, image_processor, instance_processor):
    for processor in (image_processor, instance_processor):
        transform = build_detection_transform(DetectionAugmentationArguments(), processor, image_size=48)
        dataset = rectangle_dataset(tmp_path, processor, 0, transform)
        table = dataset.dataset.remove_columns("objects").add_column("objects", ["[]"])
        label = DetectionDataset(table.cast_column("image", datasets.Image(decode=False)), processor, transform, 0)[0]
        assert label["labels"]["boxes"].shape == (0, 4) and label["labels"]["class_labels"].shape == (0,)


def test_crowds_are_for_the_evaluation_only(tmp_path, image_processor):
    folder = write_folder(tmp_path, set_value("annotations", 0, "iscrowd", 1), split="train")
    transform = build_detection_transform(DetectionAugmentationArguments(crop_prob=0), image_processor, 48)
    for options in ({"transform": transform, "seed": 0}, {}):
        dataset = DetectionDataset(load(folder)[0]["train"], image_processor, **options)
        assert dataset[0]["labels"]["class_labels"].tolist() == [0]
        assert [item["iscrowd"] for item in dataset.read(0)[1]["annotations"]] == [1, 0]


def test_augmentation_needs_a_shortest_edge():
    processor = PiipImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    with pytest.raises(ValueError, match="needs a 'shortest_edge'"):
        build_detection_transform(DetectionAugmentationArguments(), processor, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_range": [1.0, 0.5]}, "--scale_range needs two rising numbers"),
        ({"crop_range": [0.0, 0.5]}, "--crop_range needs two rising numbers"),
        ({"large_scale_jitter": [0.1]}, "--large_scale_jitter needs two rising numbers"),
        ({"crop_resize": [0.5, -1.0]}, "--crop_resize needs numbers above 0"),
        ({"hflip": 2.0}, "--hflip is a share"),
        ({"pad_to": 0}, "--pad_to must be at least 1 pixel"),
    ],
)
def test_bad_augmentation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionAugmentationArguments(**options)


# Batches


def test_batches_are_padded_with_a_mask(folder, instance_processor):
    splits, _, _ = load(folder, with_masks=True)
    dataset = DetectionDataset(splits["train"], instance_processor)
    examples = [dataset[0], dataset[1]]
    examples[1]["pixel_values"] = examples[1]["pixel_values"][:, :20, :30]
    examples[1]["labels"]["masks"] = examples[1]["labels"]["masks"][:, :20, :30]
    batch = DetectionCollator(instance_processor)(examples)
    assert batch["pixel_values"].shape == (2, 3, 32, 64) and batch["pixel_mask"].shape == (2, 32, 64)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [32 * 48, 20 * 30]
    assert torch.equal(batch["pixel_values"][1, :, :20, :30], examples[1]["pixel_values"])
    assert (batch["pixel_values"][1] * ~batch["pixel_mask"][1].bool()).abs().max() == 0
    for label in batch["labels"]:
        assert label["masks"].shape == (2, 32, 64) and label["masks"].dtype == torch.bool


def test_training_batches_can_have_one_size(folder, image_processor):
    splits, _, _ = load(folder)
    transform = build_detection_transform(DetectionAugmentationArguments(), image_processor, image_size=48)
    train = DetectionDataset(splits["train"], image_processor, transform, seed=0)
    validation = DetectionDataset(splits["validation"], image_processor)
    collate = DetectionCollator(image_processor, pad_to=64)
    assert collate([train[0], train[1]])["pixel_values"].shape == (2, 3, 64, 64)
    assert collate([validation[0]])["pixel_values"].shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="more than --pad_to 8"):
        DetectionCollator(image_processor, pad_to=8)([train[0]])


def test_labels_train_the_model(folder, image_processor):
    splits, _, _ = load(folder)
    transform = build_detection_transform(DetectionAugmentationArguments(), image_processor, image_size=48)
    dataset = DetectionDataset(splits["train"], image_processor, transform, seed=0)
    model = build(PiipForObjectDetection).train()
    outputs = model(**DetectionCollator(image_processor)([dataset[0], dataset[1]]))
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss)


# Evaluation


def test_detections_are_in_pixels_of_the_file(image_processor):
    model = build(PiipForObjectDetection)
    pixel_values = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        outputs = model(pixel_values)
    labels = [
        {"image_id": torch.tensor([number]), "orig_size": torch.tensor(size)}
        for number, size in ((4, (320, 480)), (9, (64, 96)))
    ]
    detections = get_detections(image_processor, outputs, labels)
    assert [detection["image_id"] for detection in detections] == [4, 9]
    for k, (detection, (height, width)) in enumerate(zip(detections, ((320, 480), (64, 96)))):
        boxes, best = outputs.pred_boxes[k], outputs.logits[k].flatten().argmax()
        query = best // model.config.num_labels
        center_x, center_y, box_width, box_height = boxes[query].tolist()
        left, right = (min(max(center_x + sign * box_width / 2, 0), 1) for sign in (-1, 1))
        top, bottom = (min(max(center_y + sign * box_height / 2, 0), 1) for sign in (-1, 1))
        expected = [left * width, top * height, (right - left) * width, (bottom - top) * height]
        assert detection["boxes"][0].tolist() == pytest.approx(expected, abs=1e-3)
        assert detection["labels"][0] == best % model.config.num_labels
        assert len(detection["scores"]) == 12 * model.config.num_labels


def test_previews_draw_truth_and_predictions(folder, image_processor):
    dataset = DetectionDataset(load(folder)[0]["validation"], image_processor)
    calls = []

    def draw(model, image_processor, examples):
        calls.append(examples)
        return Image.new("RGB", (8, 8))

    build_detection_previews(dataset, 2, draw)(None)
    assert [annotation["image_id"] for _, annotation in calls[0]] == [10, 12]
    assert build_detection_previews(None, 2, draw) is None and build_detection_previews(dataset, 0, draw) is None


# Options


def test_image_processor_of_a_detector_pads_and_does_not_crop(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    args = ModelArguments(config_name=str(tmp_path))
    processor = load_detection_image_processor(args, config, PiipInstanceSegmentationImageProcessor)
    assert isinstance(processor, PiipInstanceSegmentationImageProcessor)
    assert processor.do_pad and not processor.do_center_crop and processor.size["shortest_edge"] == 32
    PiipImageProcessor(size={"shortest_edge": 40}, do_center_crop=True).save_pretrained(tmp_path)
    processor = load_detection_image_processor(args, config, PiipImageProcessor)
    assert processor.do_pad and not processor.do_center_crop and processor.size["shortest_edge"] == 40


def test_learning_rate_falls_in_steps_after_the_warm_up():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    drops = DetectionOptimizationArguments().lr_drops
    scheduler = build_scheduler("constant_with_warmup", optimizer, 2, 12, drops)
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    # as after 8 and 11 of 12 epochs, but for rounding the shares to four digits
    assert rates == pytest.approx([0, 0.5, *[1] * 7, 0.1, 0.1, 0.1][:12])


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_drops_outside_of_the_training_are_refused(share):
    with pytest.raises(ValueError, match="--lr_drops needs shares"):
        OptimizationArguments(lr_drops=[share])


def test_loss_meter_averages_terms_over_batches_and_processes():
    meter = LossMeter()

    class Outputs(dict):
        __getattr__ = dict.__getitem__

    for value in (1.0, 3.0):
        meter.add(Outputs(loss=torch.tensor(value), loss_dict={"loss_giou": torch.tensor(2 * value)}))
    means = meter.compute(lambda values: torch.cat([values, values + 1]))
    assert means == pytest.approx({"loss": 2.5, "loss_giou": 4.5})
    meter.add(Outputs(loss=torch.tensor(7.0)))
    assert meter.compute(lambda values: values) == {"loss": 7.0}
