# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""The model card, README.md, of a converted folder."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


# Cards of the variants: beside this file in an installed wheel, at the top level of the repository in a checkout
_CARD_FOLDERS = (Path(__file__).parent / "hub_cards", Path(__file__).parents[1] / "hub_cards")

GENERIC_CARD = """---
{{ card_data }}
---

# {{ name }}

A Parameter-Inverted Image Pyramid Network (PIIP) whose weights were trained with the official code
(https://github.com/OpenGVLab/PIIP) and converted for Transformers. Its branches see the image at
{{ sizes }} pixels.

Neither accuracy, training data nor licence are known to the converter: write them here before you share the folder.

```python
from modeling_piip import {{ model_class }}
from transformers import AutoImageProcessor

folder = "{{ name }}"
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = {{ model_class }}.from_pretrained(folder)
```
"""


def read_variant_card(variant: str) -> str:
    """
    The checked-in card of a published variant.

    Raises:
        FileNotFoundError: If there is none.
    """
    for folder in _CARD_FOLDERS:
        if (path := folder / f"{variant}.md").is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"No model card for {variant}: write it with scripts/make_hub_cards.py {variant}.")


def render_generic_card(name: str, model_class: str, image_sizes: list[int]) -> str:
    """A short card for a model that is no published variant, saying what is known and what its owner has to add."""
    metadata = ModelCardData(library_name="transformers", tags=["piip", "image-pyramid", "vision"])
    card = ModelCard.from_template(
        metadata,
        template_str=GENERIC_CARD,
        name=name,
        model_class=model_class,
        sizes=", ".join(map(str, image_sizes)),
    )
    return f"{card.content.rstrip()}\n"
