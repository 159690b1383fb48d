"""
What a user without the package does with saved folders. `test_hub_loading.py` starts this script in a process of its
own where `modeling_piip` cannot be imported; it prints a JSON object with the traceback of every check ("" = passed).

Usage: hub_loading_checks.py FOLDERS ORIGINALS. Both hold one folder per entry of `AUTO_CLASSES`; the weights loaded
from FOLDERS must equal those in ORIGINALS. The last check saves all loaded models to `FOLDERS/saved_again`.
"""

import importlib
import json
import sys
import traceback
from importlib.abc import MetaPathFinder
from pathlib import Path


# Every saved folder, and the Auto class of the model that wrote it
AUTO_CLASSES = {
    "model": "AutoModel",
    "backbone": "AutoBackbone",
    "classification": "AutoModelForImageClassification",
    "instance_segmentation": "AutoModelForInstanceSegmentation",
    "object_detection": "AutoModelForObjectDetection",
    "semantic_segmentation": "AutoModelForSemanticSegmentation",
}
HEADS = [name for name in AUTO_CLASSES if name not in ("model", "backbone")]


class PackageBlocker(MetaPathFinder):
    """Hides the package, also where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "modeling_piip":
            raise ModuleNotFoundError("modeling_piip is hidden in this process")


def load(folders: Path, name: str, auto_class: str | None = None, **options):
    """Loads the folder `name` with its own or another Auto class."""
    import transformers

    auto_class = auto_class or AUTO_CLASSES[name]
    if auto_class == "AutoBackbone":
        # AutoBackbone.from_pretrained asks the Hub first, even for a local folder
        config = transformers.AutoConfig.from_pretrained(folders / name, trust_remote_code=True)
        backbone = transformers.AutoBackbone.from_config(config, trust_remote_code=True)
        return type(backbone).from_pretrained(folders / name, **options)
    return getattr(transformers, auto_class).from_pretrained(folders / name, trust_remote_code=True, **options)


def assert_equal_weights(model, folder: Path, prefix: str = "", dtype=None):
    """Every tensor of the model equals the one that `folder` holds under the same name with `prefix`."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    assert len(model.state_dict()) > 0
    for key, weight in model.state_dict().items():
        expected = saved[prefix + key]
        # batch norms count batches in integers
        wanted = dtype if dtype is not None and expected.is_floating_point() else expected.dtype
        assert weight.dtype == wanted, f"{key} is {weight.dtype}"
        assert torch.equal(weight, expected.to(weight.dtype)), f"{key} differs from the saved weight"


def image():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def check_package_is_hidden(folders, originals):
    try:
        importlib.import_module("modeling_piip")
    except ModuleNotFoundError:
        return
    raise AssertionError("modeling_piip can be imported, so the other checks prove nothing")


def check_every_model_loads(folders, originals):
    for name in AUTO_CLASSES:
        model = load(folders, name)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert_equal_weights(model, originals / name)


def check_base_loads_from_every_head(folders, originals):
    for name in ["backbone", *HEADS]:
        assert_equal_weights(load(folders, name, "AutoModel"), originals / name, prefix="piip.")


def check_every_head_loads_from_base(folders, originals):
    import logging

    report = []
    handler = logging.Handler()
    handler.emit = lambda record: report.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    for name in ["backbone", *HEADS]:
        report.clear()
        model, info = load(folders, "model", AUTO_CLASSES[name], output_loading_info=True)
        new = {key for key in model.state_dict() if not key.startswith("piip.")}
        assert new and info["missing_keys"] == new, info
        assert not info["unexpected_keys"] and not info["mismatched_keys"], info
        for key in new:
            assert key.split(".")[0] in str(report), f"{key} is new but not reported: {report}"
        assert_equal_weights(model.piip, originals / "model")
    logging.getLogger("transformers").removeHandler(handler)


def check_other_precision_and_placement(folders, originals):
    import torch

    for name in AUTO_CLASSES:
        assert_equal_weights(load(folders, name, dtype=torch.bfloat16), originals / name, dtype=torch.bfloat16)
        for options in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
            assert_equal_weights(load(folders, name, **options), originals / name)


def check_meta_device(folders, originals):
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folders / "model", trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    assert all(parameter.is_meta for parameter in model.parameters())


def check_processors(folders, originals):
    from transformers import AutoImageProcessor

    names = {"model": "PiipImageProcessor", "instance_segmentation": "PiipInstanceSegmentationImageProcessor"}
    for folder, name in names.items():
        for backend, suffix in (("torchvision", ""), ("pil", "Pil")):
            processor = AutoImageProcessor.from_pretrained(folders / folder, trust_remote_code=True, backend=backend)
            assert type(processor).__name__ == name + suffix
            pixel_values = processor(image(), return_tensors="pt", pad_size_divisor=32).pixel_values
            assert pixel_values.shape == (1, 3, 32, 32)


def check_image_classification_pipeline(folders, originals):
    import torch
    from transformers import AutoImageProcessor, pipeline

    classify = pipeline("image-classification", str(folders / "classification"), trust_remote_code=True)
    model = load(folders, "classification")
    processor = AutoImageProcessor.from_pretrained(folders / "classification", trust_remote_code=True)
    with torch.no_grad():
        scores = model(**processor(image(), return_tensors="pt")).logits.softmax(dim=-1)[0]
    expected = {model.config.id2label[i]: score for i, score in enumerate(scores.tolist())}
    predicted = {prediction["label"]: prediction["score"] for prediction in classify(image())}
    assert predicted.keys() == expected.keys(), predicted
    assert all(abs(predicted[label] - expected[label]) < 1e-5 for label in expected), (predicted, expected)


def check_image_segmentation_pipeline(folders, originals):
    import numpy as np
    import torch
    from transformers import AutoImageProcessor, pipeline

    segment = pipeline("image-segmentation", str(folders / "semantic_segmentation"), trust_remote_code=True)
    model = load(folders, "semantic_segmentation")
    processor = AutoImageProcessor.from_pretrained(folders / "semantic_segmentation", trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(image(), return_tensors="pt"))
    (class_map,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 50)])
    segments = {segment["label"]: np.array(segment["mask"]) > 0 for segment in segment(image())}
    assert len(segments) == len(class_map.unique())
    for class_id in class_map.unique().tolist():
        assert np.array_equal(segments[model.config.id2label[class_id]], class_map.numpy() == class_id)


def check_instance_segmentation_pipeline(folders, originals):
    import numpy as np
    import torch
    from transformers import AutoImageProcessor, pipeline

    folder, options = folders / "instance_segmentation", {"threshold": 0.05, "overlap_mask_area_threshold": 0}
    segment = pipeline("image-segmentation", str(folder), trust_remote_code=True)
    model = load(folders, "instance_segmentation")
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(image(), return_tensors="pt"))
    (expected,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(40, 50)], **options)
    segments = segment(image(), **options)
    assert len(segments) == len(expected["segments_info"]) > 0
    for found, info in zip(segments, expected["segments_info"]):
        assert found["label"] == model.config.id2label[info["label_id"]]
        assert abs(found["score"] - info["score"]) < 1e-5
        assert np.array_equal(np.array(found["mask"]) > 0, expected["segmentation"].numpy() == info["id"])


def check_object_detection_pipeline(folders, originals):
    import torch
    from transformers import AutoImageProcessor, pipeline

    detect = pipeline("object-detection", str(folders / "object_detection"), trust_remote_code=True)
    model = load(folders, "object_detection")
    processor = AutoImageProcessor.from_pretrained(folders / "object_detection", trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(image(), return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(40, 50)])
    found = detect(image(), threshold=0.0)
    assert len(found) == len(expected["scores"]) > 0
    assert [item["label"] for item in found] == [model.config.id2label[k] for k in expected["labels"].tolist()]
    assert all(abs(item["score"] - score) < 1e-5 for item, score in zip(found, expected["scores"].tolist()))


def check_image_feature_extraction_pipeline(folders, originals):
    import torch
    from transformers import AutoImageProcessor, pipeline

    model = load(folders, "model")
    processor = AutoImageProcessor.from_pretrained(folders / "model", trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(image(), return_tensors="pt"))
    for pool, expected in ((False, outputs.last_hidden_state), (True, outputs.pooler_output)):
        extract = pipeline("image-feature-extraction", str(folders / "model"), trust_remote_code=True, pool=pool)
        torch.testing.assert_close(torch.tensor(extract(image())), expected)


def check_loaded_models_are_saved_again(folders, originals):
    from transformers import AutoImageProcessor

    for name in AUTO_CLASSES:
        load(folders, name).save_pretrained(folders / "saved_again" / name)
        processor = AutoImageProcessor.from_pretrained(folders / name, trust_remote_code=True)
        processor.save_pretrained(folders / "saved_again" / name)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def main(folders: Path, originals: Path) -> dict[str, str]:
    results = {}
    for name, check in CHECKS.items():
        try:
            check(folders, originals)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
