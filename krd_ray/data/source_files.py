"""Answers how image files named by folders (`class/xxx.jpg`) or by `path label` lists become a source.

Does not open an image before it is asked for: listing costs one directory walk or one text file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from krd_ray.data.source_contract import RawSample, check_labels
from krd_ray.errors import DataError
from krd_ray.maths.longtail import BoolArray, IntArray

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"})
TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True)
class FileList:
    """Image files below one folder: relative POSIX paths and labels [N]."""

    root: Path
    paths: tuple[str, ...]
    labels: IntArray

    def iter(self, rows: Sequence[int]) -> Iterator[RawSample]:
        """The files of the given rows, bytes untouched; an unreadable one has image None."""
        for row in rows:
            where, image = self.paths[row], None
            try:
                image = (self.root / where).read_bytes()
            except OSError as error:
                where = f"{where} ({error.strerror})"
            yield RawSample(row, int(self.labels[row]), image, where)


@dataclass(frozen=True)
class FileSource:
    """A source of image files; `names` are the base names that the manifest records."""

    kind: str
    names: dict[str, str]
    classes: list[str]
    train: FileList = field(repr=False)
    test: FileList = field(repr=False)

    def describe(self) -> dict[str, str | int]:
        return {"kind": self.kind, **self.names}

    def train_labels(self) -> IntArray:
        return self.train.labels

    def train_ranks(self) -> IntArray | None:
        return None

    def test_labels(self) -> IntArray:
        return self.test.labels

    def iter_train(self, selected: BoolArray) -> Iterator[RawSample]:
        return self.train.iter(np.flatnonzero(selected).tolist())

    def iter_test(self) -> Iterator[RawSample]:
        return self.test.iter(range(len(self.test.paths)))


def open_folder(path: Path, test_path: Path | None = None) -> FileSource:
    """Source over `class/xxx.jpg`, classes in alphabetical order, images found at any depth.

    `path` may hold the classes, or `train/` with the classes and beside it `test/` or `val/`. That form is
    recognised by `train/` alone, together with a test folder (`test` wins over `val`) or with `test_path`.

    Args:
        path: folder of the images.
        test_path: test folder, as it is or below `path`; its classes must be among the train classes.
    Returns:
        The source; without a test folder its test set is empty.
    Raises:
        DataError: a folder is missing, a class is empty, or the test set has a class that train has not.
    """
    _check_folder(path)
    train_root, test_root = _split_roots(path, test_path)
    classes = _class_names(train_root)
    names = {"path": path.resolve().name}
    test = FileList(path, (), np.empty(0, dtype=np.int64))
    if test_root is not None:
        unknown = [name for name in _class_names(test_root) if name not in set(classes)]
        if unknown:
            raise DataError(f"test folder {test_root} has class {unknown[0]!r}, which {train_root} has not")
        test = _walk(test_root, classes, need_all=False)
        names["test_path"] = test_root.resolve().name
    return FileSource("folder", names, classes, _walk(train_root, classes, need_all=True), test)


def open_list(
    root: Path, train_list: Path, test_list: Path | None = None, class_names: Path | None = None
) -> FileSource:
    """Source over `path label` lists, the form in which ImageNet-LT, Places-LT and iNaturalist splits come.

    Args:
        root: folder that the listed paths start from.
        train_list: text file, one image per line: path, white space, integer label from 0.
        test_list: same form; without it the test set is empty.
        class_names: text file with one name per line, in label order. Without it the images' folder names are
            used where they match the labels one to one, else the labels.
    Returns:
        The source.
    Raises:
        DataError: a file is missing, a line cannot be read, or a label has no name.
    """
    _check_folder(root)
    train = _read_list(root, train_list)
    test = (
        FileList(root, (), np.empty(0, dtype=np.int64)) if test_list is None else _read_list(root, test_list)
    )
    classes = _names_of(train, test) if class_names is None else [x for x in _read_lines(class_names) if x]
    names = {"path": root.resolve().name, "train_list": train_list.name}
    check_labels(train.labels, classes, train_list.name)
    if test_list is not None:
        names["test_list"] = test_list.name
        check_labels(test.labels, classes, test_list.name)
    return FileSource("list", names, classes, train, test)


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"no folder {path}: give the folder that holds the images")


def _split_roots(path: Path, test_path: Path | None) -> tuple[Path, Path | None]:
    """Which folders hold the train classes and the test classes."""
    nested = path / "train"
    found = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    if test_path is None:
        if nested.is_dir() and found is not None:
            log.info("%s: training images from train/, test images from %s/", path.name, found.name)
            return nested, found
        return (nested if _class_names(path) == ["train"] else path), None
    test_root = next((root for root in (path / test_path, test_path) if root.is_dir()), None)
    if test_root is None:
        raise DataError(f"no test folder {test_path}, neither as it is nor below {path}")
    train_root = nested if nested.is_dir() else path
    if test_root.resolve().is_relative_to(train_root.resolve()):
        raise DataError(
            f"test folder {test_root} lies inside the training folder {train_root}: "
            "put the training classes into a folder of their own, named train, beside it"
        )
    return train_root, test_root


def _class_names(root: Path) -> list[str]:
    names = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(f"{root} has no subfolder: images are expected as {root.name}/CLASS/IMAGE.jpg")
    return names


def _walk(root: Path, classes: Sequence[str], *, need_all: bool) -> FileList:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            file.relative_to(root).as_posix()
            for file in (root / name).rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
        if need_all and not found:
            raise DataError(
                f"class {label} ({name!r}) has no image in {root}: add images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) "
                "or remove the folder"
            )
        paths += found
        labels += [label] * len(found)
    return FileList(root, tuple(paths), np.array(labels, dtype=np.int64))


def _read_list(root: Path, list_file: Path) -> FileList:
    paths: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(_read_lines(list_file), start=1):
        if not line:
            continue
        path, _, label = line.replace("\t", " ").rpartition(" ")
        if not path or not label.isdecimal():
            raise DataError(
                f"{list_file}, line {number}: expected 'path label' with an integer label, got {line!r}"
            )
        paths.append(path.strip())
        labels.append(int(label))
    if not paths:
        raise DataError(f"{list_file} names no image: expected lines of 'path label'")
    return FileList(root, tuple(paths), np.array(labels, dtype=np.int64))


def _read_lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _names_of(train: FileList, test: FileList) -> list[str]:
    """Folder names where each label has exactly one and no two share it; else the labels themselves."""
    num_classes = int(max(train.labels.max(), test.labels.max(initial=-1))) + 1
    names: dict[int, str] = {}
    for path, label in zip(train.paths, train.labels.tolist(), strict=True):
        parent = PurePosixPath(path).parent.name
        if not parent or names.setdefault(label, parent) != parent:
            return [str(c) for c in range(num_classes)]
    if len(names) != num_classes or len(set(names.values())) != num_classes:
        return [str(c) for c in range(num_classes)]
    return [names[c] for c in range(num_classes)]
