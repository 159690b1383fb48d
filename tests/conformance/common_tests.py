"""
The common tests that every model of the Transformers library passes, for the installed version.

Wheels of Transformers do not hold them, so they are taken from the source distribution, which is downloaded once and
kept in the user's cache folder. What that distribution lacks is replaced by stand-ins. Where the download fails, test
files that import this module are skipped.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import transformers
from filelock import FileLock
from PIL import Image


CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "piip-transformers"
PACKAGE = "transformers_common_tests"
MODULES = [
    "test_backbone_common",
    "test_configuration_common",
    "test_image_processing_common",
    "test_modeling_common",
]


def fetch_common_tests() -> Path:
    """Returns the folder that holds the package of common tests, after downloading it if it is not there yet."""
    folder = CACHE / f"transformers-{transformers.__version__}"
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
                    unpack(download(Path(temporary)), Path(temporary) / "new" / PACKAGE)
                    os.replace(Path(temporary) / "new", folder)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        pytest.skip(f"The common tests of Transformers cannot be fetched: {reason}", allow_module_level=True)
    return folder


def download(folder: Path) -> Path:
    options = "--no-binary :all: --no-deps --no-build-isolation --retries 1 --timeout 30"
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"transformers=={transformers.__version__}"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(archive: Path, folder: Path):
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for module in MODULES:
            source = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/{module}.py")
            (folder / f"{module}.py").write_bytes(source.read())


def add_stand_in(name: str, **contents):
    """Makes a module known that the common tests import but the source distribution does not hold."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


def draw_image(url: str) -> str:
    """Instead of the photo behind `url`: a smooth random picture."""
    path = Path(tempfile.gettempdir()) / f"piip-transformers-{os.getpid()}.png"
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(path)
    return str(path)


sys.path.append(str(fetch_common_tests()))
# Both mixins test text generation and exporters of Transformers; PIIP does the one never and has tests of the other.
add_stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
add_stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
add_stand_in(
    f"{PACKAGE}.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["AnyModel"],
        "id2label": {0: "label"},
        "label2id": {"label": 0},
        "problem_type": "regression",
    },
)
add_stand_in("fetch_hub_objects_for_ci", url_to_local_path=draw_image)

backbone_common = importlib.import_module(f"{PACKAGE}.test_backbone_common")
configuration_common = importlib.import_module(f"{PACKAGE}.test_configuration_common")
image_processing_common = importlib.import_module(f"{PACKAGE}.test_image_processing_common")
modeling_common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
