"""Packaging of PIIP for Transformers. This file is the only list of requirements; pyproject.toml configures tools."""

from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
README = ROOT / "README.md"

# The lowest versions are the ones that `make test-oldest` installs. torchvision's wheels name the torch they go with.
INSTALL_REQUIRES = [
    "torch>=2.9",
    "torchvision>=0.24",
    "transformers>=5.17,<6",
    "timm>=1.0.23",
    "safetensors",
    "numpy",
    "pillow",
]

EXTRAS = {
    "train": [
        "accelerate>=1.1",
        "datasets",
        "evaluate",
        "faster-coco-eval",
        "matplotlib",
        "pyyaml",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "tqdm",
    ],
    # parameterized is needed by Transformers' common tests; setuptools builds the wheel that a test looks into.
    "test": ["packaging", "parameterized", "pycocotools", "pytest>=9", "pytest-xdist", "setuptools>=77"],
}
# ruff is held to one minor version, because the next one may format the same code differently.
EXTRAS["dev"] = EXTRAS["train"] + EXTRAS["test"] + ["ruff>=0.17,<0.18"]

setup(
    name="piip-transformers",
    version="0.1.0",
    description="Parameter-Inverted Image Pyramid Networks (PIIP) as Hugging Face Transformers models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The PIIP for Transformers authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    # The variants and their model cards live at the top of the repository and travel inside the package.
    packages=["modeling_piip", "modeling_piip.configuration", "modeling_piip.hub_cards"],
    package_dir={"modeling_piip.configuration": "configuration", "modeling_piip.hub_cards": "hub_cards"},
    package_data={"modeling_piip.configuration": ["*/*.json"], "modeling_piip.hub_cards": ["*.md"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
