"""Saved folders work for users who do not have the package: they bring their code along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor

import modeling_piip
from modeling_piip import (
    PiipBackbone,
    PiipForImageClassification,
    PiipForInstanceSegmentation,
    PiipForObjectDetection,
    PiipForSemanticSegmentation,
    PiipImageProcessor,
    PiipInstanceSegmentationImageProcessor,
    PiipModel,
)

from .common import build, tiny_config
from .hub_loading_checks import AUTO_CLASSES, CHECKS


SAVED_CLASSES = {
    "model": PiipModel,
    "backbone": PiipBackbone,
    "classification": PiipForImageClassification,
    "instance_segmentation": PiipForInstanceSegmentation,
    "object_detection": PiipForObjectDetection,
    "semantic_segmentation": PiipForSemanticSegmentation,
}


def get_processor_class(name: str) -> type:
    return PiipInstanceSegmentationImageProcessor if name == "instance_segmentation" else PiipImageProcessor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    size = {"height": 32, "width": 32}
    for name, model_class in SAVED_CLASSES.items():
        build(model_class, tiny_config()).save_pretrained(folder / name)
        get_processor_class(name)(size=size, crop_size=size).save_pretrained(folder / name)
    return folder


def run_checks(folders: Path, originals: Path, home: Path) -> dict[str, str]:
    """Runs all checks in a process without the package, without network and with an empty cache."""
    script = Path(__file__).with_name("hub_loading_checks.py")
    result = subprocess.run(
        # -I: neither the current folder, nor that of the script, nor PYTHONPATH is searched for modules
        [sys.executable, "-I", str(script), str(folders), str(originals)],
        cwd=home,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    return run_checks(folders, folders, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def results_of_saved_again(folders, results, tmp_path_factory):
    return run_checks(folders / "saved_again", folders, tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("check", CHECKS)
def test_user_without_the_package(check, results):
    assert not results[check], results[check]


@pytest.mark.parametrize("check", CHECKS)
def test_user_without_the_package_after_saving_again(check, results_of_saved_again):
    assert not results_of_saved_again[check], results_of_saved_again[check]


def test_every_folder_names_every_class(folders):
    public = [getattr(modeling_piip, name) for name in modeling_piip.__all__]
    expected = {
        cls._auto_class: f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
        for cls in public
        if getattr(cls, "_auto_class", None) not in (None, "AutoImageProcessor")
    }
    assert set(AUTO_CLASSES.values()) <= expected.keys()
    for folder in (folders / name for name in SAVED_CLASSES):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert expected.items() <= auto_map.items()
        for reference in auto_map.values():
            assert (folder / f"{reference.split('.')[0]}.py").is_file()


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_installed_package_loads_without_remote_code(name, folders):
    if name == "backbone":
        config = AutoConfig.from_pretrained(folders / name)
        assert type(AutoBackbone.from_config(config)) is PiipBackbone
    else:
        auto_class = getattr(transformers, AUTO_CLASSES[name])
        assert type(auto_class.from_pretrained(folders / name)) is SAVED_CLASSES[name]
    assert type(AutoImageProcessor.from_pretrained(folders / name)) is get_processor_class(name)
