"""Answers what `krd VERB` does: it parses, calls one function and prints. No logic lives here.

Nothing heavy is imported before a verb needs it, so that `krd --help` is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from krd_ray.train.run import Outcome

INTERRUPTED = 130
app = typer.Typer(
    name="krd",
    help="Distil one strong teacher into many small students on long-tailed images, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file with the run's settings")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one setting; may be repeated")
]


@app.command()
def shards(
    source: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, folder, list or parquet")],
    out: Annotated[str, typer.Argument(help="folder or URI to write Parquet shards and dataset.json to")],
    path: Annotated[Path | None, typer.Option(help="the source's folder or Parquet file")] = None,
    test_path: Annotated[Path | None, typer.Option(help="folder or Parquet file of the test images")] = None,
    train_list: Annotated[Path | None, typer.Option(help="list: lines of `path label`")] = None,
    test_list: Annotated[Path | None, typer.Option(help="list: lines of `path label`")] = None,
    class_names: Annotated[Path | None, typer.Option(help="text file, one class name a line")] = None,
    image_column: Annotated[str | None, typer.Option(help="parquet: column of image bytes")] = None,
    label_column: Annotated[str | None, typer.Option(help="parquet: column of labels")] = None,
    rank_column: Annotated[str | None, typer.Option(help="parquet: keep rows with rank < n_c")] = None,
    download: Annotated[bool, typer.Option(help="cifar: let torchvision download it")] = False,
    imbalance_ratio: Annotated[
        float | None, typer.Option(help="head over tail; default: as the source is")
    ] = None,
    n_max: Annotated[int | None, typer.Option(help="images of the head class; default: all it has")] = None,
    seed: Annotated[int, typer.Option(help="of the draw and the shuffle")] = 0,
    class_order: Annotated[
        str, typer.Option(help="index: class 0 is the head; count: the largest is")
    ] = "index",
    val_per_class: Annotated[int, typer.Option(help="validation images per class; 0: none")] = 10,
    val_policy: Annotated[
        str,
        typer.Option(help="left_out by long-tailing, hold_out of train, or auto: the first, then the second"),
    ] = "auto",
    test_per_class: Annotated[
        int, typer.Option(help="held out per class where the source has no test images")
    ] = 30,
    store: Annotated[
        str, typer.Option(help="encoded: image bytes as they are; raw: decoded uint8")
    ] = "encoded",
    image_size: Annotated[int | None, typer.Option(help="side to decode and resize to")] = None,
    rows_per_shard: Annotated[int, typer.Option(help="rows of a Parquet file, at most")] = 2048,
    row_group_rows: Annotated[int, typer.Option(help="rows read at a time")] = 512,
    on_bad_sample: Annotated[str, typer.Option(help="error, or skip and count")] = "error",
    overwrite: Annotated[bool, typer.Option(help="replace shards made with other settings")] = False,
) -> None:
    """Write long-tailed Parquet shards from an image source."""
    from krd_ray.data.shard_options import ShardOptions
    from krd_ray.data.shards import write_shards_at
    from krd_ray.data.sources import SourceSpec, open_source
    from krd_ray.storage.places import join

    spec = SourceSpec(
        kind=source,
        path=path,
        test_path=test_path,
        train_list=train_list,
        test_list=test_list,
        class_names=class_names,
        image_column=image_column,
        label_column=label_column,
        rank_column=rank_column,
        download=download,
    )
    options = ShardOptions(
        imbalance_ratio=imbalance_ratio,
        n_max=n_max,
        seed=seed,
        class_order=class_order,  # type: ignore[arg-type]
        val_per_class=val_per_class,
        val_policy=val_policy,  # type: ignore[arg-type]
        store=store,  # type: ignore[arg-type]
        image_size=image_size,
        rows_per_shard=rows_per_shard,
        row_group_rows=row_group_rows,
        on_bad_sample=on_bad_sample,  # type: ignore[arg-type]
        test_per_class=test_per_class,
    )
    manifest = write_shards_at(open_source(spec), out, options, overwrite=overwrite)
    for line in manifest.lines():
        typer.echo(line)
    for warning in manifest.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"wrote {join(out, 'dataset.json')}")


@app.command()
def teacher(
    config: ConfigPath,
    settings: Settings = None,
    weights: Annotated[str | None, typer.Option(help="take these weights instead of training")] = None,
    out: Annotated[
        str, typer.Option(help="with --weights: file or URI to write")
    ] = "runs/teacher.safetensors",
    mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="with --weights: channel means it was trained with"),
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="with --weights: channel deviations, in [0, 1] units"),
    ] = None,
) -> None:
    """Train a teacher (a config with `teacher: null` and one student), or take weights as one."""
    from krd_ray.config_io import load_config

    loaded = load_config(config, settings or ())
    if weights is not None:
        from krd_ray.train.import_teacher import import_teacher

        card = import_teacher(loaded, weights, out, mean=mean, std=std)
        accuracy = "no val split" if card.val_balanced is None else f"{card.val_balanced:.1%} on val"
        typer.echo(f"{card.model}: {accuracy}; wrote {out}")
        return
    from krd_ray.train.run import start_run

    outcome = start_run(loaded)
    _finish(outcome, evaluate=loaded.evaluate)
    for student in loaded.students:
        typer.echo(f"weights: {outcome.run.place_of(outcome.run.student(student.name).weights)}")


@app.command()
def distill(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the run's settings")] = None,
    settings: Settings = None,
    resume: Annotated[str | None, typer.Option(help="continue the unfinished students of this run")] = None,
) -> None:
    """Train several students at once from one served teacher."""
    from krd_ray.config_io import load_config
    from krd_ray.errors import ConfigError
    from krd_ray.train.run import resume_run, start_run

    if (config is None) == (resume is None):
        raise ConfigError("give either a config file or --resume RUN_DIR")
    if resume is not None:
        if settings:
            raise ConfigError("--resume repeats the run's own config.yaml; --set does not go with it")
        outcome = resume_run(resume)
        _finish(outcome, evaluate=outcome.config.evaluate)
        return
    assert config is not None
    loaded = load_config(config, settings or ())
    _finish(start_run(loaded), evaluate=loaded.evaluate)


@app.command()
def tune(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file with the run's settings, one student")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="what is drawn: a file like those in tune_spaces/")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="how many, the config as it stands included [default: 40]")
    ] = None,
    settings: Settings = None,
    student: Annotated[str | None, typer.Option(help="which student, where the config has several")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="of a trial; 0: the config's train.epochs [default: 0]")
    ] = None,
    prune: Annotated[
        bool | None,
        typer.Option(
            "--prune/--no-prune", help="stop trials early that fall behind (one metric only) [default: prune]"
        ),
    ] = None,
    grace_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="epochs before a trial may be stopped; 0: a quarter of them [default: 0]"),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="trials at the same time [default: what the cluster holds]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the sampler [default: 0]")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="of the study: sqlite:///FILE, postgresql://... [default: a journal file]"),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="its name in --storage [default: the folder's name]")
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option("--from", metavar="SEARCH_DIR", help="begin from an earlier search's trials"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="continue this search; --trials, --at-once and --confirm... may change"),
    ] = None,
    confirm: Annotated[
        bool | None,
        typer.Option(
            "--confirm/--no-confirm",
            help="at the end, train best and baseline with several seeds and test both once [default: confirm]",
        ),
    ] = None,
    confirm_seeds: Annotated[
        str | None, typer.Option(help="seeds of that comparison [default: 0 1 2]")
    ] = None,
) -> None:
    """Search settings with many trials that share one teacher, one target store and one cluster."""
    from krd_ray.tune.command import Asked, open_search, print_search
    from krd_ray.tune.search import run_search

    asked = Asked(
        trials, epochs, seed, storage, study, prune, grace_epochs, at_once, confirm, confirm_seeds, earlier
    )
    search = open_search(config, space, asked, settings or (), student=student, resume=resume, say=typer.echo)
    run_search(search, typer.echo)
    print_search(search.folder, typer.echo)


@app.command()
def targets(config: ConfigPath, settings: Settings = None) -> None:
    """Fill the teacher's store with all views of all images, so that later runs need no teacher."""
    from krd_ray.config_io import load_config
    from krd_ray.train.fill import fill_targets

    filled = fill_targets(load_config(config, settings or ()), typer.echo)
    typer.echo(
        f"{filled.rows:,} targets of {filled.views} view(s) in {filled.store_dir}, {filled.num_bytes:,} bytes; "
        f"{filled.forwards:,} computed in {filled.seconds:.1f} s"
    )
    typer.echo("train from them with --set teacher.placement=stored")


@app.command()
def plan(
    config: ConfigPath,
    settings: Settings = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="of measuring, per network")] = 3.0,
) -> None:
    """Measure teacher and students on this machine, and say how they should share it and what sharing saves."""
    from krd_ray.train.plan_command import plan_file, print_plan

    planned, warnings = plan_file(config, settings or (), seconds=seconds, say=typer.echo)
    print_plan(planned, warnings)


@app.command()
def evaluate(
    run_dir: Annotated[str, typer.Argument(help="run directory: folder or URI")],
    again: Annotated[bool, typer.Option(help="read the test split once more")] = False,
) -> None:
    """Evaluate teacher and students of a run on its balanced test split."""
    from krd_ray.train.assess import evaluate_run

    evaluate_run(run_dir, again=again)
    _print_table(run_dir)


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(help="directory of a run (folder or URI) or of a search")],
) -> None:
    """Write the HTML report of a run or a search, with its pictures and their data."""
    from krd_ray.report.at_places import report_on

    typer.echo(f"report: {report_on(run_dir)}")


@app.command()
def compare(
    run_dirs: Annotated[
        list[str], typer.Argument(help="run directories: folders or URIs", metavar="RUN_DIR...")
    ],
    split: Annotated[str, typer.Option(help="test: evaluation.json; val: the last val row")] = "test",
    out: Annotated[Path, typer.Option(help="folder for table, pictures and page")] = Path("runs/comparison"),
    against: Annotated[str | None, typer.Option(help="a method: differences to it, paired by seed")] = None,
) -> None:
    """Compare methods over models, seeds and runs: mean and spread as table, CSV and pictures."""
    from krd_ray.errors import ConfigError
    from krd_ray.report.at_places import compare_at
    from krd_ray.report.terminal import print_methods

    if split not in ("test", "val"):
        raise ConfigError(f"--split is test or val, got {split}")
    comparison, files = compare_at(run_dirs, out, split=split, against=against)  # type: ignore[arg-type]
    print_methods(comparison)
    for path in files:
        typer.echo(f"wrote {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for shards, runs and report")] = Path("runs/demo"),
) -> None:
    """Run everything once on long-tailed digits: shards, teacher, six students, table, report."""
    from krd_ray.demo import run_demo

    outcome, page = run_demo(out, typer.echo)
    _print_table(outcome.run.place)
    typer.echo(f"report: {page}")
    _fail_if_any(outcome)


@app.command()
def models(
    num_classes: Annotated[int, typer.Option(help="C")] = 100,
    image_size: Annotated[int, typer.Option(help="side in pixels")] = 32,
    torchvision: Annotated[bool, typer.Option(help="torchvision's classifiers too (names only)")] = False,
) -> None:
    """List the models by name with their parameters and FLOPs (2 per multiply-add)."""
    from krd_ray.models.registry import lines_of_models

    for line in lines_of_models(num_classes, image_size, include_torchvision=torchvision):
        typer.echo(line)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="a run's settings that the cluster must hold")] = None,
    address: Annotated[str | None, typer.Option(help="of a cluster; without: this machine")] = None,
    shared: Annotated[str | None, typer.Option(help="folder or URI that all nodes share")] = None,
) -> None:
    """Check a cluster, or this machine: what is wrong on which node, and what mends it."""
    from krd_ray.config_io import load_config
    from krd_ray.doctor.command import examine, show

    if not show(examine(address, shared, load_config(config) if config else None)):
        raise typer.Exit(1)


def _finish(outcome: Outcome, *, evaluate: bool) -> None:
    """Evaluates, reports and prints; the exit code says whether every student finished."""
    from krd_ray.report.at_places import report_on
    from krd_ray.train.assess import evaluate_run

    place = outcome.run.place
    if evaluate and len(outcome.failed) < len(outcome.results):
        evaluate_run(place, again=outcome.num_trained > 0)
    _print_table(place)
    typer.echo(f"report: {report_on(place)}")
    _fail_if_any(outcome)


def _fail_if_any(outcome: Outcome) -> None:
    from krd_ray.errors import RunError

    if outcome.failed:
        reasons = "\n".join(f"  {result['student']}: {result['error']}" for result in outcome.failed)
        raise RunError(
            f"{len(outcome.failed)} of {len(outcome.results)} students did not finish:\n{reasons}\n"
            f"mend the cause, then `krd distill --resume {outcome.run.place}`"
        )


def _print_table(run_dir: str) -> None:
    from krd_ray.report.at_places import print_headline_of

    print_headline_of(run_dir)


def main() -> None:
    """Entry point of `krd`: errors that are meant for people are printed without a traceback."""
    from krd_ray.errors import Interrupted, KrdError

    sys.path.insert(0, "")  # a user's own model, `my_pkg.my_mod:fn`, lies where krd is called
    try:
        app()
    except KrdError as error:
        typer.echo(f"error: {error.message}", err=True)
        if isinstance(error, Interrupted):
            sys.stdout.flush()
            os._exit(INTERRUPTED)  # at once: threads of the driver still wait for students
        sys.exit(1)


if __name__ == "__main__":
    main()
