"""Answers how to import torchvision in a process where its compiled part may not fit the installed torch.

Does not repair compiled operators: `ops.nms` and `io.decode_*` stay unusable where that part cannot load.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

OPS_GIVEN_SHAPES = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Imports torchvision; all of krd_ray gets it from here and only when it is needed.

    Returns:
        The module `torchvision`, the same object every time.
    Raises:
        ImportError: torchvision is not installed.

    Example:
        >>> import_torchvision().models.resnet18.__name__
        'resnet18'
    """
    make_torchvision_importable()
    return importlib.import_module("torchvision")


def make_torchvision_importable() -> None:
    """Lets `import torchvision` succeed in this process, here or in a user's own code.

    Package indexes pair a CPU-only torch with a torchvision built for CUDA. Its compiled part then cannot
    load (the CUDA libraries are missing). torchvision tolerates that, but while being imported it still
    registers shape functions for `torchvision::nms` and `torchvision::qnms`, and the import dies with
    "operator torchvision::nms does not exist". Declaring the two schemas first is enough: models, datasets
    and transforms.v2 are pure Python and work.

    The declaration is made only where torch has no CUDA and the compiled part has been tried and does not
    load; declaring an operator that the compiled part also defines would make that part fail. With a CUDA
    torch a mismatch is a broken installation, and torchvision's own error is left to say so.

    Example:
        >>> make_torchvision_importable()
        >>> import torchvision
    """
    may_lack_ops = torch.version.cuda is None and "torchvision" not in sys.modules
    if may_lack_ops and _missing_ops() and not _compiled_part_loads():
        for op_name in _missing_ops():
            torch.library.define(f"torchvision::{op_name}", SCHEMA)  # torch keeps it for the process's life


def _missing_ops() -> list[str]:
    return [op_name for op_name in OPS_GIVEN_SHAPES if not hasattr(torch.ops.torchvision, op_name)]


def _compiled_part_loads() -> bool:
    """Loads torchvision's compiled part as torchvision itself will, but before it; True where that works."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return False
    finder = importlib.machinery.FileFinder(
        package.submodule_search_locations[0],
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
    )
    compiled = finder.find_spec("_C")
    if compiled is None or compiled.origin is None:
        return False
    try:
        torch.ops.load_library(compiled.origin)
    except OSError:
        return False
    return True
