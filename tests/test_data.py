import random

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_piip.data import (
    AugmentationArguments,
    ImageClassificationDataset,
    ImageDataArguments,
    MixupCollator,
    UnreadableImageError,
    build_collator,
    build_datasets,
    build_train_transform,
    check_examples,
    collate_images,
    get_input_size,
    load_image_classification_data,
    open_image,
)
from modeling_piip.image_processing_piip import PiipImageProcessor


CLASSES = ["ant", "bee", "cat"]
STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 1.0}


def write_image(path, shade: int = 0, mode: str = "RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_folder(folder, **classes_per_split):
    for split, classes in classes_per_split.items():
        for class_id, name in enumerate(classes):
            for index in range(4):
                write_image(folder / split / name / f"{index}.png", shade=10 * class_id + index)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=CLASSES, test=CLASSES)


@pytest.fixture(scope="module")
def image_processor():
    return PiipImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def load(data_dir, **kwargs):
    names = ("seed", "model_labels", "training")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    return load_image_classification_data(ImageDataArguments(data_dir=str(data_dir), **kwargs), **options)


def in_memory(monkeypatch, labels, feature, **splits):
    """Makes every Hub data set one of plain images with these labels."""
    features = datasets.Features({"img": datasets.Image(), "fine_label": feature})
    image = {"bytes": None, "path": "image.png"}
    data = datasets.Dataset.from_dict({"img": [image] * len(labels), "fine_label": labels}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(train=data, **splits))
    return ImageDataArguments(dataset_name="someone/something")


# Loading


def test_folder_gives_both_splits_and_sorted_class_names(folder):
    splits, label_names = load(folder)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 12, "validation": 12}
    assert label_names == CLASSES
    assert splits["train"]["label"][:] == [0] * 4 + [1] * 4 + [2] * 4


def test_held_out_share_has_every_class_and_no_training_image(tmp_path):
    write_folder(tmp_path, **{".": CLASSES})
    splits, _ = load(tmp_path, train_val_split=0.25, seed=1)
    paths = {split: {image["path"] for image in dataset["image"]} for split, dataset in splits.items()}
    assert sorted(splits["validation"]["label"][:]) == [0, 1, 2]
    assert len(paths["train"]) == 9 and not paths["train"] & paths["validation"]


def test_sample_limits_draw_from_all_classes(folder):
    splits, _ = load(folder, max_train_samples=6, max_eval_samples=2)
    assert (len(splits["train"]), len(splits["validation"])) == (6, 2)
    assert len(set(splits["train"]["label"])) > 1


def test_classes_of_the_checkpoint_keep_their_ids(folder):
    splits, label_names = load(folder, model_labels=["cat", "bee", "ant"])
    assert label_names == ["cat", "bee", "ant"]
    assert splits["train"]["label"][:] == [2] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize(("training", "expected"), [(True, CLASSES), (False, ["bee", "dog", "cat", "ant"])])
def test_evaluation_may_have_only_some_classes_of_the_checkpoint(folder, training, expected):
    _, label_names = load(folder, model_labels=["bee", "dog", "cat", "ant"], training=training)
    assert label_names == expected


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        (["b", "a", "b"], datasets.Value("string"), ["a", "b"]),
        ([2, 0, 1], datasets.Value("int64"), ["0", "1", "2"]),
        ([1, 0, 1], datasets.ClassLabel(names=["x", "y"]), ["x", "y"]),
    ],
)
def test_columns_and_class_names_are_found_by_type(monkeypatch, labels, feature, names):
    args = in_memory(monkeypatch, labels, feature)
    args.label_column_name = "fine_label"
    splits, label_names = load_image_classification_data(args)
    assert label_names == names
    expected = [names.index(label) if isinstance(label, str) else label for label in labels]
    assert splits["train"]["label"][:] == expected
    assert splits["train"].column_names == ["image", "label"]


@pytest.mark.parametrize("label", [-1, None])
def test_label_out_of_range_is_named(monkeypatch, label):
    args = in_memory(monkeypatch, [0, label, 1], datasets.ClassLabel(names=["x", "y"]))
    with pytest.raises(ValueError, match=rf"Image 1 of the train split has the label {label}, .* 2 classes"):
        load_image_classification_data(args)


def test_unknown_column_lists_the_columns(monkeypatch):
    args = in_memory(monkeypatch, [0, 1], datasets.Value("int64"))
    with pytest.raises(ValueError, match="--label_column_name among img, fine_label"):
        load_image_classification_data(args)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("with_text", [False, True])
def test_folder_without_images_is_an_error(tmp_path, with_text):
    if with_text:
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images. Expected .*train/<class>"):
        load(tmp_path)


def test_one_class_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"1 class \(ant\): a classifier needs at least two"):
        load(write_folder(tmp_path, train=["ant"], test=["ant"]))


def test_class_without_training_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="without a training image: dog"):
        load(write_folder(tmp_path, train=["ant", "bee"], test=["ant", "dog"]))


def test_unknown_split_lists_the_splits(folder):
    with pytest.raises(ValueError, match="--eval_split dev is not among the splits of the data: train, test"):
        load(folder, eval_split="dev")


@pytest.mark.parametrize("kwargs", [{}, {"data_dir": "x", "dataset_name": "y"}])
def test_one_source_of_data_is_required(kwargs):
    with pytest.raises(ValueError, match="either --dataset_name .* or --data_dir"):
        ImageDataArguments(**kwargs)


def test_truncated_image_is_named_with_its_path(tmp_path, image_processor):
    write_folder(tmp_path, train=CLASSES)
    broken = tmp_path / "train" / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    splits, _ = load(tmp_path)
    dataset = ImageClassificationDataset(splits["train"], image_processor)
    with pytest.raises(ValueError, match=r"Cannot read the image .*train/bee/2\.png \(image 6 of the train split\)"):
        dataset[6]


def test_image_with_too_many_pixels_is_named_with_its_path(folder, image_processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    dataset = ImageClassificationDataset(load(folder)[0]["train"], image_processor)
    with pytest.raises(UnreadableImageError, match=r"train/bee/2\.png \(image 6 of the train split\).*exceeds limit"):
        dataset[6]


def test_null_image_is_named_by_its_row_or_skipped(folder, image_processor):
    columns = {"image": [f"{folder}/train/ant/0.png", None], "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    data = datasets.Dataset.from_dict(columns, features=features, split="train")
    with pytest.raises(UnreadableImageError, match=r"null instead of .*\(image 1 of the train split\)"):
        ImageClassificationDataset(data, image_processor)[1]
    with pytest.raises(UnreadableImageError, match="null instead of .*image 2"):
        open_image({"bytes": None, "path": None}, "image 2")
    dataset = ImageClassificationDataset(data, image_processor, skip_unreadable=True)
    check_examples(dataset)
    assert [example["label"] for example in dataset.dataset] == [0]


# Augmentation


def test_same_seed_epoch_and_index_give_the_same_image(folder, image_processor):
    splits, _ = load(folder)
    first, _ = build_datasets(splits, image_processor, AugmentationArguments(**STRONG), seed=3)
    second, _ = build_datasets(splits, image_processor, AugmentationArguments(**STRONG), seed=3)
    other, _ = build_datasets(splits, image_processor, AugmentationArguments(**STRONG), seed=4)
    first[0]
    assert torch.equal(first[5]["pixel_values"], second[5]["pixel_values"])
    assert not torch.equal(first[5]["pixel_values"], other[5]["pixel_values"])
    second.set_epoch(1)
    assert not torch.equal(first[5]["pixel_values"], second[5]["pixel_values"])


def test_augmentation_leaves_the_random_states_alone(folder, image_processor):
    train, _ = build_datasets(load(folder)[0], image_processor, AugmentationArguments(**STRONG), seed=3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    train[0]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_augmentation_uses_the_size_and_statistics_of_the_processor():
    image_processor = PiipImageProcessor(
        size={"height": 24, "width": 40}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    assert get_input_size(image_processor) == (24, 40)
    pixel_values = build_train_transform(AugmentationArguments(), image_processor)(Image.new("RGB", (64, 64), "white"))
    assert pixel_values.shape == (3, 24, 40)
    assert torch.allclose(pixel_values, torch.ones(()))


def test_evaluation_and_unaugmented_training_are_what_the_processor_does(folder, image_processor):
    splits, _ = load(folder)
    train, validation = build_datasets(splits, image_processor, AugmentationArguments(augment=False), seed=0)
    image = Image.open(splits["train"][3]["image"]["path"])
    expected = image_processor(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(train[3]["pixel_values"], expected)
    assert torch.equal(validation[3]["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path, image_processor, mode):
    for name in CLASSES:
        write_image(tmp_path / "train" / name / "image.tiff", mode=mode)
    splits, _ = load(tmp_path)
    train, _ = build_datasets(splits, image_processor, AugmentationArguments(), seed=0)
    assert train[0]["pixel_values"].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hflip": 2}, "--hflip is a share"),
        ({"mixup": -1}, "--mixup must not be negative"),
        ({"crop_scale": [0.9, 0.1]}, "--crop_scale needs two rising numbers"),
    ],
)
def test_impossible_augmentation_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AugmentationArguments(**kwargs)


def test_unknown_policy_is_an_error(image_processor):
    with pytest.raises(ValueError, match="--auto_augment flip-and-pray"):
        build_train_transform(AugmentationArguments(auto_augment="flip-and-pray"), image_processor)


# Batches


def make_examples(number: int, **kwargs) -> list[dict]:
    return [
        {"pixel_values": torch.full((3, 8, 8), float(index)), "labels": index % 3, **kwargs} for index in range(number)
    ]


def test_collator_without_mixing_keeps_class_ids():
    collator = build_collator(AugmentationArguments(), num_labels=3)
    assert collator is collate_images
    batch = collator(make_examples(4, seed=0))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("number", [1, 4, 5])
def test_mixed_labels_are_the_shares_of_the_images(number):
    collator = build_collator(AugmentationArguments(mixup=1.0), num_labels=3)
    examples = make_examples(number, seed=1)
    batch = collator(examples)
    assert batch["labels"].shape == (number, 3)
    assert torch.allclose(batch["labels"].sum(dim=1), torch.ones(number))
    one_hot = torch.nn.functional.one_hot(torch.tensor([example["labels"] for example in examples]), 3).float()
    for pixels, label, index in zip(batch["pixel_values"], batch["labels"], range(number)):
        partner = number // 2 * 2 - 1 - index
        share = 1.0
        if partner >= 0 and partner != index:
            share = (pixels[0, 0, 0] - partner) / (index - partner)
        assert torch.allclose(label, share * one_hot[index] + (1 - share) * one_hot[partner], atol=1e-5)


def test_mixing_depends_on_the_seed_of_the_batch_only():
    collator = MixupCollator(AugmentationArguments(mixup=0.8, cutmix=1.0), num_labels=3)
    first, again = collator(make_examples(4, seed=5)), collator(make_examples(4, seed=5))
    other = collator(make_examples(4, seed=6))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["labels"], other["labels"])


def test_smoothing_alone_and_evaluation_batches():
    collator = build_collator(AugmentationArguments(smoothing=0.3), num_labels=3)
    assert torch.allclose(collator(make_examples(1, seed=0))["labels"], torch.tensor([[0.8, 0.1, 0.1]]))
    assert collator(make_examples(2))["labels"].tolist() == [0, 1]


# Metric


def test_accuracy_counts_first_and_first_five_classes(pytestconfig, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load(str(pytestconfig.rootpath / "scripts" / "metrics" / "accuracy"), keep_in_memory=True)
    ranked = np.array([[3, 1, 2, 0, 4], [5, 3, 1, 0, 2], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]])
    results = metric.compute(predictions=ranked, references=[3, 2, 0, 0])
    assert results == {"accuracy": 0.5, "top5_accuracy": 0.75}
    metric.add_batch(predictions=torch.tensor([[1, 0], [0, 1]]), references=torch.tensor([1, 1]))
    assert metric.compute() == {"accuracy": 0.5}
