"""Labels as StyleGAN2-ADA and StyleGAN3 store them: a `dataset.json` beside the images of a folder or zip.

    {"labels": [["00000/img00000000.png", 3], ["00000/img00000001.png", 0], ...]}        or        {"labels": null}

Source: https://github.com/NVlabs/stylegan3, dataset_tool.py --help, "Output".
"""

from __future__ import annotations

import json

from biggan.data.labels import checked_labels, no_labels
from runtime.errors import UserError

LABELS_FILE = "dataset.json"


def stylegan_labels(data: bytes, names: list[str], where: str) -> tuple[list[int], list[str]] | None:
    """The labels of images by what dataset.json says; its null puts all into one class, whatever their folders.

    Args:
        data: the file.
        names: the images, relative to its folder.
        where: the folder or archive, for messages.

    Returns:
        a label for each name and the class names; None where the file is another program's (it speaks of no labels).

    Raises:
        UserError: no JSON, an image without label, or labels that are no classes.
    """
    file = f"{LABELS_FILE} of {where}"
    try:
        content = json.loads(data)
        if not isinstance(content, dict) or "labels" not in content:
            return None
        pairs = content["labels"]
        by_name = None if pairs is None else {name.replace("\\", "/"): label for name, label in dict(pairs).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{file} is damaged; expected {{"labels": [["name.png", 3], ...]}} or null: {error}') from None
    if not by_name:  # null, or an empty list
        labels, class_names = no_labels(len(names))
        return labels.tolist(), class_names
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"{file} has no label for {len(missing):,} of {len(names):,} images, {missing[0]} for one")
    values = [by_name[name] for name in names]
    strange = next((label for label in values if type(label) is not int or abs(label) >= 1 << 63), None)
    if strange is not None:  # StyleGAN also takes vectors, which are no classes
        raise UserError(f"the labels in {file} must be whole numbers; found {json.dumps(strange)[:60]}")
    labels, class_names = checked_labels(values, f"the labels in {file}")
    return labels.tolist(), class_names
