"""Answers how good the students are: `python -m benchmarks.quality` makes the README's tables.

Does not choose anything and does not hold numbers: configs say what is trained, `krd compare` makes the tables.
A call goes on where the last one stopped, so that a long benchmark may be run in pieces; what has been started
keeps its settings, so that other settings need another --out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.entry import run_command
from benchmarks.quality.parts import CONFIGS, EPOCH_SHARE, FORMS, PARTS, VAL_PER_CLASS, Part, RunSpec
from krd_ray.config import RunConfig
from krd_ray.config_io import load_config
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.errors import RunError
from krd_ray.report.comparison import compare_runs
from krd_ray.report.comparison_page import write_comparison
from krd_ray.report.terminal import print_methods
from krd_ray.train.assess import evaluate_run
from krd_ray.train.run import Outcome, resume_run, start_run
from krd_ray.train.rundir import RunDir, environment, read_json, write_json

RESULTS = Path(__file__).parent.parent / "results" / "quality"
TINY = ["train.epochs=1", "train.warmup_epochs=0", "train.val_every_epochs=1"]
TINY_STUDENTS = [
    "compare.seeds=[0]",
    "train.max_failures=0",
    "students_at_once=2",
    "teacher.min_accuracy=0",  # one epoch on a few images teaches a large network nothing
]
ON_CPU = {"num_cpus": 0.25}
MINUTES = "minutes.json"
TINY_IMAGES, TINY_RATIO, TINY_PER_CLASS = 12, 4, 3


def main(
    data: Annotated[Path, typer.Option(help="folder of train.parquet and test.parquet, or of CIFAR-100")],
    form: Annotated[str, typer.Option(help="cpu: thin nets, 16x16; gpu: ResNet-32x4 -> 8x4, 32x32")] = "cpu",
    part: Annotated[
        list[str] | None, typer.Option(help="table to make; may be repeated; default: all")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of shards and run directories")] = Path("runs/quality"),
    results: Annotated[Path, typer.Option(help="folder of tables and pictures")] = RESULTS,
    download: Annotated[bool, typer.Option(help="let torchvision download CIFAR-100 to --data")] = False,
    tiny: Annotated[bool, typer.Option(help="one epoch, one seed, CPU: does everything run?")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="override a setting of every run")
    ] = None,
) -> None:
    """Write shards, train teachers and students, evaluate, make the tables."""
    known = PARTS.get(form)
    if known is None:
        raise typer.BadParameter(f"--form must be one of {', '.join(PARTS)}, got {form!r}")
    chosen = {name: known[name] for name in part or known if name in known}
    if len(chosen) != len(set(part or known)):
        raise typer.BadParameter(f"--part must be one of {', '.join(known)} in the form {form}")
    bench = Bench(
        form,
        out.resolve() / (f"{form}-tiny" if tiny else form),
        data.resolve(),
        download,
        tiny,
        settings or [],
    )
    for name, table in chosen.items():
        runs = [bench.run(spec) for spec in table.runs]
        bench.tabulate(table, runs, results.resolve() / (f"{form}-tiny" if tiny else form) / name)


class Bench:
    """The benchmark of one form in one folder; each step is skipped when what it makes is there."""

    def __init__(
        self, form: str, root: Path, data: Path, download: bool, tiny: bool, settings: list[str]
    ) -> None:
        self.form, self.root, self.data = form, root, data
        self.download, self.tiny, self.settings = download, tiny, settings

    def shards(self, ratio: int) -> Path:
        """CIFAR-100 with an exponential tail, decoded once; validation images are those the tail leaves out."""
        folder = self.root / f"shards-{ratio}" / "cifar100-lt"
        if (folder / "dataset.json").is_file():
            return folder
        ranked = (self.data / "train.parquet").is_file()
        spec = SourceSpec(
            kind="parquet" if ranked else "cifar100",
            path=self.data / "train.parquet" if ranked else self.data,
            test_path=self.data / "test.parquet" if ranked and not self.tiny else None,
            rank_column="rank_in_class" if ranked else None,
            download=self.download,
        )
        options = ShardOptions(
            imbalance_ratio=min(ratio, TINY_RATIO) if self.tiny else ratio,
            n_max=TINY_IMAGES if self.tiny else 500,
            val_per_class=0 if ratio <= 10 else TINY_PER_CLASS if self.tiny else VAL_PER_CLASS,
            test_per_class=TINY_PER_CLASS,
            val_policy="left_out",
            store="raw",
            image_size=FORMS[self.form].side,
        )
        write_shards(open_source(spec), folder, options)
        return folder

    def teacher(self, name: str, ratio: int) -> Path:
        """The weights of the teacher of one imbalance ratio, trained if they are not there."""
        root = self.root / f"{name}-{ratio}"
        self._train(self._config(name, ratio, root), root)
        return RunDir(root).student("teacher").weights

    def run(self, spec: RunSpec) -> Path:
        """One `krd distill`, from where it stopped to its evaluation."""
        root = self.root / spec.name
        if not RunDir(root).evaluation.is_file():
            teacher = f"teacher.weights={self.teacher(spec.teacher, spec.ratio)}"
            own = [teacher, f"name={self.form}-{spec.name}", *(TINY_STUDENTS if self.tiny else [])]
            self._train(self._config(spec.config, spec.ratio, root, own), root)
            evaluate_run(root)
        return root

    def tabulate(self, part: Part, runs: list[Path], folder: Path) -> None:
        """`krd compare` over the part's runs; beside the tables, what they ran on and how long it took."""
        comparison = compare_runs(runs, split=part.split, against=part.against)
        write_comparison(comparison, folder)
        minutes = {run.name: read_json(run / MINUTES) for run in runs}
        write_json(folder / "environment.json", {**environment(), "minutes": minutes})
        print_methods(comparison)
        typer.echo(f"wrote {folder}")

    def _config(self, name: str, ratio: int, root: Path, own: Sequence[str] = ()) -> RunConfig:
        """A config file with this call's paths and the epochs of its ratio; the tiny form reserves no GPU."""
        path = CONFIGS / self.form / f"{name}.yaml"
        epochs = round(load_config(path).train.epochs * EPOCH_SHARE[ratio])
        settings = [f"run_dir={root}", f"data.dir={self.shards(ratio)}", f"train.epochs={epochs}", *own]
        config = load_config(path, [*settings, *(TINY if self.tiny else []), *self.settings])
        return _without_gpus(config) if self.tiny else config

    def _train(self, config: RunConfig, root: Path) -> None:
        run = RunDir(root)
        names = [student.name for student in config.students]
        if all(_finished(run, name) for name in names):
            return
        started = time.time()
        outcome: Outcome = resume_run(root) if run.config.exists() else start_run(config)
        log = run.root / MINUTES
        before = read_json(log) if log.is_file() else []
        write_json(log, [*before, (time.time() - started) / 60])
        if outcome.failed:
            raise RunError(
                f"{root}: {', '.join(str(each['student']) for each in outcome.failed)} did not finish"
            )


def _finished(run: RunDir, name: str) -> bool:
    path = run.student(name).result
    return path.is_file() and read_json(path)["status"] == "finished"


def _without_gpus(config: RunConfig) -> RunConfig:
    raw = config.model_dump(mode="json")
    for owner in [*raw["students"], *([raw["teacher"]] if raw["teacher"] else [])]:
        owner["resources"] = ON_CPU
    return RunConfig.model_validate(raw)


if __name__ == "__main__":
    run_command(main)
