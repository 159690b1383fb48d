# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Files that are written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output_dir(output_dir: str | Path) -> Path:
    """
    Refuses an output folder that already holds something.

    Raises:
        FileExistsError: If `output_dir` is a file or a folder that is not empty.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir.is_file():
        raise FileExistsError(f"{output_dir} is a file: name a folder.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: remove it or name another folder.")
    return output_dir


@contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """
    Yields a temporary folder beside `output_dir` that takes its place when the block ends without an error. Whatever
    interrupts the block leaves nothing behind.
    """
    output_dir = check_output_dir(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary) / output_dir.name
        folder.mkdir()
        yield folder
        # replaces an empty folder too
        folder.replace(output_dir)
