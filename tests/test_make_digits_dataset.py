import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_digits

from modeling_piip.image_processing_piip_instance_segmentation import decode_segmentation
from scripts import make_digits_dataset


def run(output_dir: Path, *options: str) -> None:
    make_digits_dataset.main(["--task", "classification", "--output_dir", str(output_dir), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "nested" / "digits"
    run(folder)
    return folder


def test_every_digit_is_written_once_under_its_class(digits_folder):
    labels = load_digits().target
    written = {}
    for path in digits_folder.glob("*/*/*.png"):
        index = int(path.stem.removeprefix("digit_"))
        assert index not in written, "the splits share an image"
        written[index] = int(path.parent.name)
    assert written == dict(enumerate(labels))


def test_the_test_split_is_a_fifth_of_every_class(digits_folder):
    for label, count in enumerate(np.bincount(load_digits().target)):
        test_count = len(list((digits_folder / "test" / str(label)).iterdir()))
        assert abs(test_count - count / 5) < 1


def test_images_show_the_digits(digits_folder):
    path = next((digits_folder / "train" / "7").iterdir())
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (64, 64)
        pixels = np.asarray(image.convert("L"), dtype=np.float64)
    expected = load_digits().images[int(path.stem.removeprefix("digit_"))]
    # The mean of each 8 x 8 block follows the pixel that it was enlarged from.
    blocks = pixels.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert np.corrcoef(blocks.ravel(), expected.ravel())[0, 1] > 0.95


def test_same_seed_writes_the_same_bytes(digits_folder, tmp_path):
    run(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits_folder)


def test_another_seed_is_another_split():
    labels = load_digits().target
    first, second = (make_digits_dataset.split_indices(labels, seed)["test"] for seed in (0, 1))
    assert len(first) == len(second) and set(first) != set(second)


def test_load_dataset_reads_the_folder(digits_folder, tmp_path):
    dataset = load_dataset("imagefolder", data_dir=str(digits_folder), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 1437, "test": 360}
    assert dataset["train"].features["label"].names == [str(digit) for digit in range(10)]


# Scenes


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(make_digits_dataset, "NUM_SCENES", {"train": 12, "validation": 5})


def run_semantic(output_dir: Path, *options: str) -> None:
    make_digits_dataset.main(["--task", "semantic", "--output_dir", str(output_dir), *options])


def read_coco(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def test_scenes_have_maps_of_their_size_and_names_of_the_classes(few_scenes, tmp_path):
    run_semantic(tmp_path / "scenes")
    assert (tmp_path / "scenes" / "classes.txt").read_text().split() == ["background", *"0123456789"]
    seen = set()
    for split, count in make_digits_dataset.NUM_SCENES.items():
        images = sorted((tmp_path / "scenes" / "images" / split).iterdir())
        labels = sorted((tmp_path / "scenes" / "labels" / split).iterdir())
        assert [file.stem for file in images] == [file.stem for file in labels] and len(images) == count
        for image_file, label_file in zip(images, labels):
            with Image.open(image_file) as image, Image.open(label_file) as label:
                assert image.size == label.size == (128, 128)
                assert image.mode == "RGB" and label.mode == "L"
                seen |= set(np.unique(label).tolist())
    assert {0, 1} < seen <= set(range(11))


def test_ink_is_brighter_than_what_is_behind_it(few_scenes, tmp_path):
    run_semantic(tmp_path / "scenes")
    for file in (tmp_path / "scenes" / "images" / "train").iterdir():
        image = np.asarray(Image.open(file).convert("L"), dtype=float)
        ink = np.asarray(Image.open(tmp_path / "scenes" / "labels" / "train" / f"{file.stem}.png")) > 0
        assert image[ink].mean() > image[~ink].mean() + 30


def test_held_out_scenes_show_held_out_digits(few_scenes, tmp_path, monkeypatch):
    digits = load_digits().images
    used = []
    original = make_digits_dataset.make_scene

    def make_scene(rng, images, targets, photos):
        used.append({image.tobytes() for image in images})
        return original(rng, images, targets, photos)

    monkeypatch.setattr(make_digits_dataset, "make_scene", make_scene)
    run_semantic(tmp_path / "scenes")
    train, validation = used[0], used[-1]
    assert used == [train] * 12 + [validation] * 5
    assert not train & validation and len(train) + len(validation) == len({image.tobytes() for image in digits})


def test_same_seed_writes_the_same_scenes(few_scenes, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        run_semantic(tmp_path / name, "--seed", seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != contents(tmp_path / "other")


def test_tasks_describe_the_same_scenes(few_scenes, tmp_path):
    for task in ("semantic", "detection", "instance"):
        make_digits_dataset.main(["--task", task, "--output_dir", str(tmp_path / task)])
    scenes = contents(tmp_path / "semantic" / "images")
    assert scenes == contents(tmp_path / "detection" / "images") == contents(tmp_path / "instance" / "images")
    for split, count in make_digits_dataset.NUM_SCENES.items():
        coco = read_coco(tmp_path / "instance", split)
        assert [category["name"] for category in coco["categories"]] == list("0123456789")
        assert len(coco["images"]) == count
        class_maps = {
            image["id"]: np.array(
                Image.open(tmp_path / "semantic" / "labels" / split / image["file_name"].replace("jpg", "png"))
            )
            for image in coco["images"]
        }
        for item in coco["annotations"]:
            mask = decode_segmentation(item["segmentation"], 128, 128, "object")
            class_map = class_maps[item["image_id"]]
            assert (class_map[mask] == item["category_id"] + 1).all() and item["area"] == mask.sum()
            class_map[mask] = 0
            rows, columns = np.nonzero(mask)
            x, y, width, height = item["bbox"]
            assert (rows.min(), rows.max() + 1) == (y, y + height)
            assert (columns.min(), columns.max() + 1) == (x, x + width)
        # every digit of the maps is an object
        assert not any(class_map.any() for class_map in class_maps.values())

        boxes = read_coco(tmp_path / "detection", split)
        assert boxes["images"] == coco["images"] and boxes["categories"] == coco["categories"]
        for item, box in zip(coco["annotations"], boxes["annotations"], strict=True):
            assert "segmentation" not in box and box["area"] == box["bbox"][2] * box["bbox"][3]
            assert all(box[key] == item[key] for key in ("id", "image_id", "category_id", "bbox", "iscrowd"))
        ids = [item["id"] for item in boxes["annotations"]]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_same_seed_writes_the_same_objects(few_scenes, tmp_path, task):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        make_digits_dataset.make_dataset(task, tmp_path / name, seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != contents(tmp_path / "other")


def test_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        run(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_file_as_output_dir_is_refused(tmp_path):
    file = tmp_path / "digits"
    file.touch()
    with pytest.raises(SystemExit, match="is a file"):
        run(file)


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_digits_dataset, "digit_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_unknown_task_is_an_error_that_names_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_digits_dataset.main(["--task", "depth", "--output_dir", str(tmp_path / "digits")])
    message = capsys.readouterr().err
    assert "depth" in message and "classification" in message
