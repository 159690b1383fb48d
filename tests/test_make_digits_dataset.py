from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_digits

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
