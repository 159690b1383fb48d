import json

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_piip.data import UnreadableImageError, check_examples
from modeling_piip.image_processing_piip import PiipImageProcessor
from modeling_piip.training import ModelArguments
from modeling_piip.training_semantic_segmentation import (
    SegmentationAugmentationArguments,
    SegmentationDataArguments,
    SegmentationTransform,
    SemanticSegmentationDataset,
    build_previews,
    build_segmentation_datasets,
    check_last_batch,
    collate_maps,
    get_flat_maps,
    load_segmentation_image_processor,
    load_semantic_segmentation_data,
    name_results,
    read_class_names,
)

from .common import tiny_config


CLASSES = ["sky", "tree", "dog"]


def write_pair(root, split, name, size=(24, 20), seed=0, class_ids=None, mode="L"):
    rng = np.random.default_rng(seed)
    if class_ids is None:
        class_ids = rng.integers(0, 3, size[::-1])
    for kind, pixels, suffix in (
        ("images", rng.integers(0, 256, (size[1], size[0], 3)), "jpg"),
        ("labels", np.asarray(class_ids), "png"),
    ):
        path = root / kind / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.astype(np.uint8))
        (image.convert(mode) if kind == "labels" else image).save(path)


def write_folder(root, sizes=((24, 20), (20, 24), (24, 20))):
    for split in ("train", "validation"):
        for index, size in enumerate(sizes):
            write_pair(root, split, f"{index}", size, seed=index)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture(scope="module")
def image_processor():
    return PiipImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)


def load(folder, **kwargs):
    names = ("seed", "model_labels", "training")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    return load_semantic_segmentation_data(SegmentationDataArguments(data_dir=str(folder), **kwargs), **options)


def read_dataset(folder, image_processor, num_labels=3, split="validation", **kwargs):
    return SemanticSegmentationDataset(load(folder)[0][split], image_processor, num_labels=num_labels, **kwargs)


# Loading


def test_folder_gives_pairs_of_files_and_class_names(folder):
    splits, label_names = load(folder)
    assert label_names == CLASSES
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 3, "validation": 3}
    example = splits["train"][1]
    assert example["image"]["path"] == str(folder / "images" / "train" / "1.jpg")
    assert example["label"]["path"] == str(folder / "labels" / "train" / "1.png")


def test_layout_of_ade20k_is_read(folder):
    (folder / "labels").rename(folder / "annotations")
    for kind in ("images", "annotations"):
        (folder / kind / "train").rename(folder / kind / "training")
    splits, _ = load(folder, train_split="training")
    assert splits["train"][0]["label"]["path"].endswith("annotations/training/0.png")


def test_images_without_splits_are_held_out(tmp_path):
    for index in range(4):
        write_pair(tmp_path, ".", str(index))
    (tmp_path / "classes.json").write_text(json.dumps({"0": "sky", "1": "tree", "2": "dog"}))
    splits, label_names = load(tmp_path, train_val_split=0.25)
    assert (len(splits["train"]), len(splits["validation"])) == (3, 1)
    assert label_names == CLASSES


def test_split_without_maps_is_left_out(folder):
    write_pair(folder, "test", "0")
    (folder / "labels" / "test" / "0.png").unlink()
    (folder / "labels" / "test").rmdir()
    assert load(folder)[0].keys() == {"train", "validation"}


def test_columns_of_a_hub_data_set_are_found(monkeypatch, folder, tmp_path):
    columns = {
        "image": [str(folder / "images" / "train" / "0.jpg")],
        "annotation": [str(folder / "labels" / "train" / "0.png")],
        "name": ["first"],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "annotation": datasets.Image(), "name": datasets.Value("string")}
    )
    data = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    args = SegmentationDataArguments(
        dataset_name="someone/something", class_names_file=str(folder / "classes.txt"), eval_split="train"
    )
    splits, label_names = load_semantic_segmentation_data(args)
    assert label_names == CLASSES and splits["train"].column_names == ["image", "label"]
    assert splits["train"][0]["label"]["path"].endswith("0.png")


def test_local_folder_as_a_hub_data_set_needs_class_names(folder, tmp_path_factory):
    splits, _ = load(folder)
    saved = tmp_path_factory.mktemp("hub")
    splits["train"].cast(datasets.Features({name: datasets.Image() for name in ("image", "label")})).to_parquet(
        saved / "train.parquet"
    )
    with pytest.raises(ValueError, match="The data does not name its classes.* --class_names_file"):
        load_semantic_segmentation_data(SegmentationDataArguments(dataset_name=str(saved)))


def test_names_of_the_checkpoint_stand_in_for_evaluation_only(folder):
    (folder / "classes.txt").unlink()
    assert load(folder, model_labels=["a", "b"], training=False)[1] == ["a", "b"]
    with pytest.raises(ValueError, match="write classes.txt with a class name per line"):
        load(folder, model_labels=["a", "b"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", "sky\n\ndog\n", "gives id 1 the name ''"),
        ("classes.txt", "sky\nsky\n", "gives id 1 the name 'sky'"),
        ("classes.txt", "sky\n", "names 1 classes"),
        ("classes.json", '{"0": "sky", "2": "dog"}', r"without a gap, got \[0, 2\]"),
    ],
)
def test_unusable_class_names_are_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / name)


def test_image_without_map_is_named(folder):
    (folder / "labels" / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 3 images .* have no map, .*labels/train/1\.png"):
        load(folder)


def test_empty_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no folders 'images' and 'labels'. Expected images/<split>"):
        load(tmp_path)
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="images/train holds no images"):
        load(tmp_path)


# Unusable files


def test_map_of_another_size_is_named(folder, image_processor):
    write_pair(folder, "validation", "1", class_ids=np.zeros((7, 9)))
    with pytest.raises(ValueError, match=r"labels/validation/1\.png .*\(7, 9\), but the image has \(20, 24\)"):
        check_examples(read_dataset(folder, image_processor))


def test_unknown_class_id_is_named_with_its_file(folder, image_processor):
    write_pair(folder, "validation", "2", class_ids=np.full((20, 24), 7))
    with pytest.raises(ValueError, match=r"labels/validation/2\.png .* holds the class id 7, but there are 3 class"):
        check_examples(read_dataset(folder, image_processor))


def test_map_of_colours_is_named(folder, image_processor):
    write_pair(folder, "validation", "2", mode="RGB")
    with pytest.raises(ValueError, match=r"labels/validation/2\.png .* mode RGB: expected one channel"):
        check_examples(read_dataset(folder, image_processor))


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_unreadable_file_stops_the_check_or_is_left_out(folder, image_processor, kind):
    (file,) = (folder / kind / "validation").glob("1.*")
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UnreadableImageError, match=rf"{kind}/validation/1\..* \(image 1 of the validation split\)"):
        check_examples(read_dataset(folder, image_processor))
    dataset = read_dataset(folder, image_processor, skip_unreadable=True)
    check_examples(dataset)
    assert [example["image"]["path"][-5] for example in dataset.dataset] == ["0", "2"]


def test_only_unreadable_files_are_an_error(folder, image_processor):
    for file in (folder / "images" / "validation").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UnreadableImageError, match="None of the 3 images"):
        check_examples(read_dataset(folder, image_processor, skip_unreadable=True))


def test_next_image_replaces_one_that_became_unreadable(folder, image_processor):
    stopping = read_dataset(folder, image_processor)
    going_on = read_dataset(folder, image_processor, skip_unreadable=True)
    training = read_dataset(folder, image_processor, skip_unreadable=True, seed=0)
    (folder / "images" / "validation" / "2.jpg").unlink()
    with pytest.raises(UnreadableImageError, match=r"2\.jpg"):
        stopping[2]
    assert torch.equal(going_on[2]["pixel_values"], going_on[0]["pixel_values"])
    assert (going_on[2]["labels"] == 255).all(), "in evaluation no image counts twice"
    assert torch.equal(training[2]["labels"], training[0]["labels"])


# Processing


def test_evaluation_keeps_the_size_of_the_maps(folder, image_processor):
    example = read_dataset(folder, image_processor)[1]
    assert example["pixel_values"].shape == (3, 38, 32)
    class_ids = np.asarray(Image.open(folder / "labels" / "validation" / "1.png"))
    assert np.array_equal(example["labels"], class_ids)


def test_unaugmented_training_is_what_the_processor_does(folder, image_processor):
    args = SegmentationDataArguments(data_dir=str(folder))
    train, _ = build_segmentation_datasets(
        load(folder)[0], image_processor, tiny_config(), args, SegmentationAugmentationArguments(augment=False), seed=0
    )
    files = [folder / "images" / "train" / "1.jpg", folder / "labels" / "train" / "1.png"]
    expected = image_processor(Image.open(files[0]), Image.open(files[1]), return_tensors="pt")
    assert torch.equal(train[1]["pixel_values"], expected["pixel_values"][0])
    assert torch.equal(train[1]["labels"], expected["labels"][0])


@pytest.mark.parametrize("seed", [None, 0])
def test_labels_are_reduced_once(folder, seed):
    class_ids = np.zeros((20, 24))
    class_ids[:10] = 3
    write_pair(folder, "validation", "0", class_ids=class_ids)
    reducing = PiipImageProcessor(size={"shortest_edge": 20}, do_center_crop=False, do_reduce_labels=True)
    labels = read_dataset(folder, reducing, seed=seed)[0]["labels"]
    assert (labels[:10] == 2).all() and (labels[10:] == 255).all()


def test_reduction_of_other_classes_must_be_chosen(folder, tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    PiipImageProcessor(do_reduce_labels=True).save_pretrained(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path))

    def load_processor(label_names, **kwargs):
        args = SegmentationDataArguments(data_dir=str(folder), **kwargs)
        return load_segmentation_image_processor(model_args, config, args, ["a", "b", "c"], label_names)

    with pytest.raises(ValueError, match=r"\(sky, tree, dog, ...\): say --do_reduce_labels true, or false"):
        load_processor(CLASSES)
    assert load_processor(CLASSES, do_reduce_labels=False).do_reduce_labels is False
    image_processor = load_processor(["a", "b", "c"])
    assert image_processor.do_reduce_labels is True and image_processor.do_center_crop is False


# Augmentation


def build_transform(crop_size=32, image_processor=None, **kwargs):
    options = {"scale_range": [1.0, 1.0], "photometric": 0.0, "hflip": 0.0, "max_class_ratio": 1.0} | kwargs
    # pixels stay what they are, so that they can be compared with the map
    plain = PiipImageProcessor(
        size={"shortest_edge": 32}, resample=0, do_center_crop=False, do_rescale=False, do_normalize=False
    )
    return SegmentationTransform(SegmentationAugmentationArguments(**options), image_processor or plain, crop_size)


def blocks(height, width, side=8) -> np.ndarray:
    """A map of squares of the classes 0, 1 and 2."""
    rows, columns = np.mgrid[:height, :width] // side
    return (rows + 2 * columns) % 3


@pytest.mark.parametrize("options", [{}, {"hflip": 1.0}, {"scale_range": [0.5, 0.5]}, {"scale_range": [2.0, 2.0]}])
def test_image_and_map_stay_together_and_padding_is_zero_and_ignored(options):
    class_ids = blocks(48, 32)
    image = torch.from_numpy(np.stack([class_ids + 1] * 3)).to(torch.uint8)
    example = build_transform(crop_size=40, **options)(image, class_ids)
    assert example["pixel_values"].shape == (3, 40, 40) and example["labels"].shape == (40, 40)
    expected = torch.where(example["labels"] == 255, 0, example["labels"] + 1)
    assert torch.equal(example["pixel_values"][0], expected.float())
    size = [min(round(side * options.get("scale_range", [1])[0]), 40) for side in (48, 32)]
    assert (example["labels"] != 255).sum() == size[0] * size[1]


def test_flip_mirrors():
    class_ids = np.zeros((32, 32), dtype=np.int64)
    class_ids[:, :8] = 1
    labels = build_transform(hflip=1.0)(torch.zeros(3, 32, 32, dtype=torch.uint8), class_ids)["labels"]
    assert (labels[:, -8:] == 1).all() and (labels[:, :-8] == 0).all()


def test_padding_is_zero_after_normalization():
    image_processor = PiipImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    example = build_transform(40, image_processor)(torch.full((3, 32, 32), 255, dtype=torch.uint8), blocks(32, 32))
    expected = (1 - torch.tensor(image_processor.image_mean)) / torch.tensor(image_processor.image_std)
    assert torch.allclose(example["pixel_values"][:, :32, :32], expected[:, None, None].expand(-1, 32, 32), atol=1e-5)
    assert (example["pixel_values"][:, 32:] == 0).all() and (example["pixel_values"][:, :, 32:] == 0).all()


def test_crops_avoid_areas_of_one_class():
    class_ids = np.zeros((128, 128), dtype=np.int64)
    class_ids[48:80, 48:80] = 1
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    plain = {"image_processor": PiipImageProcessor(size={"shortest_edge": 128}, do_center_crop=False)}
    shares = {}
    for ratio in (0.75, 1.0):
        torch.manual_seed(0)
        transform = build_transform(32, **plain, max_class_ratio=ratio)
        labels = torch.stack([transform(image, class_ids)["labels"] for _ in range(50)])
        shares[ratio] = ((labels == 1).float().mean(dim=(1, 2)) > 0.25).float().mean().item()
    assert shares[0.75] > 2 * shares[1.0], shares


def test_colours_change_with_photometric_only():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32))).to(torch.uint8)
    assert torch.equal(build_transform()(image, blocks(32, 32))["pixel_values"], image.float())
    changed = build_transform(photometric=1.0)(image, blocks(32, 32))
    assert not torch.equal(changed["pixel_values"], image.float())
    assert torch.equal(changed["labels"], torch.from_numpy(blocks(32, 32)))


def test_random_choices_depend_on_seed_epoch_and_index(folder, image_processor):
    args = SegmentationDataArguments(data_dir=str(folder))

    def build(seed):
        splits = load(folder)[0]
        return build_segmentation_datasets(
            splits, image_processor, tiny_config(), args, SegmentationAugmentationArguments(), seed
        )[0]

    first, second, other = build(3), build(3), build(4)
    first[0]
    assert torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])
    assert not torch.equal(first[2]["pixel_values"], other[2]["pixel_values"])
    second.set_epoch(1)
    assert not torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hflip": 2}, "--hflip is a share"),
        ({"scale_range": [2.0, 0.5]}, "--scale_range needs two rising numbers"),
        ({"crop_size": 0}, "--crop_size must be at least 1"),
    ],
)
def test_impossible_augmentation_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SegmentationAugmentationArguments(**kwargs)


# Batches


def test_images_of_several_sizes_do_not_make_a_batch(folder, image_processor):
    dataset = read_dataset(folder, image_processor)
    batch = collate_maps([dataset[0], dataset[2]])
    assert batch["pixel_values"].shape == (2, 3, 32, 38) and batch["labels"].shape == (2, 20, 24)
    with pytest.raises(ValueError, match="--per_device_eval_batch_size 1"):
        collate_maps([dataset[0], dataset[1]])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_last_batch_of_one_image_is_an_error(folder, image_processor, batch_size):
    dataset = read_dataset(folder, image_processor)
    check_last_batch(dataset, 3)
    with pytest.raises(ValueError, match=f"3 training images in batches of {batch_size} .*--max_train_samples 2"):
        check_last_batch(dataset, batch_size)


# Results


def load_metric(num_labels=4):
    return evaluate.load("scripts/metrics/mean_iou", num_labels=num_labels, keep_in_memory=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch, pytestconfig):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(pytestconfig.rootpath)


def naive_results(predictions, references, num_labels):
    """Counts per class, pixel by pixel of the whole data set; `nan` for what does not occur."""
    pairs = [
        (prediction, reference)
        for maps in zip(predictions, references)
        for prediction, reference in zip(*(np.asarray(m).ravel().tolist() for m in maps))
        if reference != 255
    ]
    iou, accuracy = [], []
    for label in range(num_labels):
        both = sum(prediction == reference == label for prediction, reference in pairs)
        either = sum(label in pair for pair in pairs)
        true = sum(reference == label for _, reference in pairs)
        iou.append(both / either if either else np.nan)
        accuracy.append(both / true if true else np.nan)
    return {
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "overall_accuracy": sum(prediction == reference for prediction, reference in pairs) / len(pairs),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


@pytest.fixture
def maps():
    """Maps of several sizes with ignored pixels; class 3 is predicted but never true, class 4 does not occur."""
    rng = np.random.default_rng(0)
    references = [rng.integers(0, 3, size) for size in ((5, 7), (6, 4), (3, 3))]
    predictions = [np.where(rng.random(m.shape) < 0.6, m, rng.integers(0, 4, m.shape)) for m in references]
    references[1][:2] = 255
    return predictions, references


def assert_results(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("to_type", [np.asarray, torch.as_tensor])
def test_metric_equals_a_naive_count_in_batches_and_at_once(maps, to_type):
    predictions, references = ([to_type(m) for m in each] for each in maps)
    expected = naive_results(*maps, num_labels=5)
    metric = load_metric(5)
    assert_results(metric.compute(predictions=predictions, references=references), expected)
    for prediction, reference in zip(predictions, references):
        metric.add_batch(predictions=prediction[None], references=reference[None])
    assert_results(metric.compute(), expected)


def test_padded_and_flat_maps_count_the_same(maps):
    predictions, references = maps
    length = max(m.size for m in references)
    flat = [
        np.stack([np.pad(m.ravel(), (0, length - m.size), constant_values=fill) for m in each])
        for each, fill in ((predictions, 0), (references, -100))
    ]
    results = load_metric().compute(predictions=flat[0], references=flat[1])
    assert_results(results, naive_results(*maps, num_labels=4))


def test_metric_keeps_counts_only(maps):
    metric = load_metric()
    metric.add_batch(predictions=maps[0], references=maps[1])
    before = metric.confusion_matrix.shape, metric.writer, metric.data
    for _ in range(3):
        metric.add_batch(predictions=maps[0], references=maps[1])
    assert (metric.confusion_matrix.shape, metric.writer, metric.data) == before == ((4, 4), None, None)


def test_metric_refuses_what_it_cannot_count(maps):
    predictions, references = maps
    with pytest.raises(ValueError, match="prediction has class ids from 0 to 3, but there are 3"):
        load_metric(3).compute(predictions=predictions, references=references)
    with pytest.raises(ValueError, match=r"shape \(3, 3\), its reference \(5, 7\)"):
        load_metric().compute(predictions=predictions[2:], references=references[:1])


def test_only_ignored_pixels_give_no_number():
    results = load_metric().compute(predictions=np.zeros((1, 2, 2), int), references=np.full((1, 2, 2), 255))
    assert np.isnan(results["mean_iou"]) and np.isnan(results["overall_accuracy"])


def test_results_name_the_classes_that_occur():
    results = {"mean_iou": 0.5, "mean_accuracy": 0.6, "overall_accuracy": 0.7, "per_category_iou": [0.1, np.nan, 0.9]}
    assert name_results(results, CLASSES) == {
        "mean_iou": 0.5,
        "mean_accuracy": 0.6,
        "overall_accuracy": 0.7,
        "iou_sky": 0.1,
        "iou_dog": 0.9,
    }


def test_logits_are_compared_in_the_size_of_the_map(image_processor):
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 20, 24, dtype=torch.long)
    predictions, references = get_flat_maps(image_processor, logits, labels)
    expected = torch.nn.functional.interpolate(logits, (20, 24), mode="bilinear").argmax(dim=1)
    assert torch.equal(predictions, expected.flatten(1)) and references.shape == (2, 480)


def test_previews_spread_over_the_data(folder, image_processor):
    dataset = read_dataset(folder, image_processor)
    examples = build_previews(dataset, 2).keywords["examples"]
    assert [image.size for image, _ in examples] == [(24, 20), (24, 20)]
    assert np.array_equal(examples[1][1], dataset.read(2)[1])
    assert build_previews(dataset, 0) is None and build_previews(None, 2) is None
