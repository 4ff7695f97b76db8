"""The command line: parse, call one function, print. Nothing heavy is imported before a command runs."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivit.pipeline.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_SOME_CLIPS_FAILED, VivitError

if TYPE_CHECKING:
    from vivit.end_to_end.demo import DemoResult
    from vivit.pipeline.manifest import Manifest
    from vivit.stage1_extract.extract import ExtractSummary
    from vivit.stage2_temporal.evaluation import Evaluation

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train video transformers in minutes: run the frozen spatial encoder once, keep its features, train the rest.",
    epilog="Exit codes: 0 complete, 1 error, 2 wrong usage, 3 finished but some clips failed, 130 interrupted.",
)

_DATA, _VIEWS, _ENCODER, _RUNNING = "Data", "Views", "Encoder", "Running"

Workdir = Annotated[
    Path,
    typer.Option(
        envvar="VIVIT_WORKDIR", help="Folder of manifests, caches and runs.", rich_help_panel=_RUNNING
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Feature cache: a path with a /, or a name below WORKDIR/caches.", rich_help_panel=_DATA
    ),
]
Run = Annotated[
    str | None,
    typer.Option(help="Run folder: a path with a /, or a name below WORKDIR/runs.", rich_help_panel=_DATA),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the videos. [dim]Default: VIVIT_DATA_ROOT/<data set>, or data/<data set>.[/]",
        rich_help_panel=_DATA,
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the annotation files, if not found below the data root.", rich_help_panel=_DATA
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_RUNNING)]
Precision = Annotated[
    str | None,
    typer.Option(
        help="auto, float32, bfloat16. [dim]auto is bfloat16 on a GPU.[/]", rich_help_panel=_RUNNING
    ),
]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial", help="Use what is there of an incomplete cache.", rich_help_panel=_RUNNING
    ),
]
_DEFAULT_WORKDIR = Path("vivit-work")


def main() -> None:
    """Run the command line; an error of ours becomes one line and its exit code."""
    # OpenMP threads that wait spin for milliseconds by default: with other work on the cores that costs a factor of 10
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("vivit").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except VivitError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'no file named'}", EXIT_ERROR)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    print(f"error: {message}" if code != EXIT_INTERRUPTED else message, file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from vivit import __version__

        print(f"vivit {__version__}")
        context.exit()


@app.command(epilog="[b]Example:[/] vivit demo")
def demo(
    workdir: Workdir = _DEFAULT_WORKDIR,
    seed: Annotated[int, typer.Option(help="Seed of the videos, the views and the training.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of using what an earlier demo left.")
    ] = False,
) -> None:
    """Show the whole method on a generated video data set, on the CPU in a few minutes.

    Writes real mp4 files whose classes can only be told from the order of frames, runs prepare, extract,
    train-temporal and evaluate on them, and compares the temporal transformer with average pooling.
    """
    from vivit.end_to_end.demo import run_demo

    _print_demo(run_demo(workdir / "demo", seed=seed, fresh=fresh), workdir / "demo")


@app.command(
    epilog="[b]Examples:[/] vivit prepare ek100 --data-root /data/EPIC-KITCHENS\n\n"
    "vivit prepare folder --data-root my_videos"
)
def prepare(
    dataset: Annotated[str, typer.Argument(help="ek100, or folder for <class>/<video>.")],
    data_root: DataRoot = None,
    annotations: Annotations = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Make the manifest of a data set from its annotation files, and say which videos are missing."""
    from vivit.pipeline.datasets import read_dataset
    from vivit.pipeline.workspace import Workspace

    manifest, root = read_dataset(dataset, data_root, annotations)
    path = Workspace(workdir).manifests / f"{manifest.dataset}.parquet"
    manifest.write(path)
    _print_manifest(manifest, root)
    print(f"wrote {path}")


@app.command(
    epilog="[b]Examples:[/] vivit extract --dataset ek100 --backbone vit_l16\n\n"
    "vivit extract --dataset folder --data-root my_videos --backbone vit_b16 --train-views 4\n\n"
    "vivit extract --manifest clips.csv --weights model.safetensors --num-frames 16"
)
def extract(
    dataset: Annotated[
        str | None, typer.Option(help="ek100, or folder for <class>/<video>.", rich_help_panel=_DATA)
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Manifest (.parquet or .csv) instead of a data set.", rich_help_panel=_DATA),
    ] = None,
    data_root: DataRoot = None,
    annotations: Annotations = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="vit_ti16, vit_s16, vit_b16, vit_l16, ... or any timm id. [dim]Default: vit_b16.[/]",
            rich_help_panel=_ENCODER,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="pretrained (timm's), random, or a file: .safetensors, .pth, .npz. [dim]Default: pretrained.[/]",
            rich_help_panel=_ENCODER,
        ),
    ] = None,
    precision: Precision = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Frame crops per forward pass. [dim]Default: 32.[/]", rich_help_panel=_ENCODER),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames per view. [dim]Default: 32.[/]", rich_help_panel=_VIEWS)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Source frames from one frame to the next. [dim]Default: 2.[/]", rich_help_panel=_VIEWS
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Resample to this rate before the stride.", rich_help_panel=_VIEWS)
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Short side before cropping, in pixels. [dim]Default: 256.[/]", rich_help_panel=_VIEWS
        ),
    ] = None,
    crop_size: Annotated[
        int | None,
        typer.Option(help="Side of a crop, in pixels. [dim]Default: 224.[/]", rich_help_panel=_VIEWS),
    ] = None,
    flip: Annotated[
        float | None,
        typer.Option(
            help="Probability of mirroring a training view. [dim]Default: 0.5.[/]", rich_help_panel=_VIEWS
        ),
    ] = None,
    train_views: Annotated[
        int | None,
        typer.Option(help="Random views per training clip. [dim]Default: 1.[/]", rich_help_panel=_VIEWS),
    ] = None,
    test_clips: Annotated[
        int | None,
        typer.Option(help="Temporal clips per test clip. [dim]Default: 4.[/]", rich_help_panel=_VIEWS),
    ] = None,
    test_crops: Annotated[
        int | None,
        typer.Option(
            help="Spatial crops per temporal clip: 1 or 3. [dim]Default: 3.[/]", rich_help_panel=_VIEWS
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the training views. [dim]Default: 0.[/]", rich_help_panel=_VIEWS),
    ] = None,
    cache: Cache = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Clips committed together. [dim]Default: 64.[/]", rich_help_panel=_RUNNING),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="none or zstd. [dim]Default: none.[/]", rich_help_panel=_RUNNING)
    ] = None,
    workers: Annotated[int, typer.Option(help="0: in this process.", rich_help_panel=_RUNNING)] = 0,
    decode_threads: Annotated[
        int | None, typer.Option(help="Threads that decode ahead.", rich_help_panel=_RUNNING)
    ] = None,
    clip_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds a clip may take to decode. [dim]Default: 120.[/]", rich_help_panel=_RUNNING
        ),
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option(help="Stop when more clips fail. [dim]Default: never.[/]", rich_help_panel=_RUNNING),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Try clips without features again; the others keep theirs.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    device: Device = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Stage 1: every view of every clip through the frozen encoder, once, into a feature cache.

    The same command again goes on after an interruption, and ends with the same bytes. Defaults of views are those of
    Kinetics; ek100 has stride 1 and 4 x 1 test views.
    """
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.workspace import Workspace, file_name
    from vivit.stage1_extract.extract import ExtractConfig, describe
    from vivit.stage1_extract.extract import extract as run_extract

    if workers != 0:
        raise ConfigError(f"--workers {workers}: only 0, extraction in this process, is there yet")
    clips, root = _clips(dataset, manifest, data_root, annotations, Workspace(workdir))
    views = _views(clips.dataset, num_frames=num_frames, stride=stride, fps=fps, resize=resize, crop_size=crop_size,
                   flip=flip, train_views=train_views, test_clips=test_clips, test_crops=test_crops)  # fmt: skip
    backbone = backbone or ExtractConfig.backbone
    name = cache or f"{file_name(clips.dataset)}-{file_name(backbone)}"
    config = ExtractConfig(
        cache=_below(Workspace(workdir).caches, name, ".zarr"),
        data_root=root,
        views=views,
        **_given(
            backbone=backbone, weights=weights, seed=seed, device=device, precision=precision, batch_size=batch_size,
            block_size=block_size, codec=codec, decode_threads=decode_threads, clip_timeout_sec=clip_timeout,
            max_failures=max_failures, retry_failed=retry_failed,
        ),
    )  # fmt: skip
    _print_settings("extract", describe(config))
    summary = run_extract(config, clips)
    _print_extracted(summary)
    if summary.failures:
        raise typer.Exit(EXIT_SOME_CLIPS_FAILED)


@app.command(
    "train-temporal",
    epilog="[b]Examples:[/] vivit train-temporal\n\nvivit train-temporal --epochs 50 --learning-rate 1e-3 --mixup 0.3\n\n"
    "vivit train-temporal --temporal mean   [dim]# average pooling, the baseline[/]",
)
def train_temporal(
    cache: Cache = None,
    run: Run = None,
    epochs: Annotated[
        int | None, typer.Option(help="Times that each clip is used. [dim]Default: 30.[/]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips per step. [dim]Default: 64.[/]")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd. [dim]Default: adamw.[/]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate. [dim]Default: 0.0005.[/]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of the matrices. [dim]Default: 0.05.[/]")
    ] = None,
    warmup_epochs: Annotated[
        float | None, typer.Option(help="Epochs of linear warm-up; then cosine.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of each target spread over all classes. [dim]Default: 0.1.[/]")
    ] = None,
    mixup: Annotated[
        float | None, typer.Option(help="Alpha of feature mixup; 0 is off. [dim]Default: 0.[/]")
    ] = None,
    drop_path: Annotated[
        float | None, typer.Option(help="Stochastic depth of the last block. [dim]Default: 0.1.[/]")
    ] = None,
    temporal: Annotated[
        str | None,
        typer.Option(help="transformer, or mean for average pooling. [dim]Default: transformer.[/]"),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Blocks of the temporal transformer. [dim]Default: 4.[/]")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads. [dim]Default: one per 64 channels.[/]")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="bottleneck or none. [dim]Default: bottleneck.[/]")
    ] = None,
    adapter_width: Annotated[int | None, typer.Option(help="Channels inside the adapter.")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of averaged weights. [dim]Default: off.[/]")
    ] = None,
    clip_grad: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient. [dim]Default: 1.[/]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initialisation, order and augmentation. [dim]Default: 0.[/]")
    ] = None,
    allow_partial: AllowPartial = False,
    device: Device = None,
    precision: Precision = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Stage 2: train adapter, temporal transformer and heads on a feature cache.

    Without --cache the newest one is taken. The same command again goes on after an interruption.
    """
    from vivit.pipeline.workspace import Workspace
    from vivit.stage2_temporal.config import TrainConfig
    from vivit.stage2_temporal.run_folder import default_run_name
    from vivit.stage2_temporal.train import train

    workspace = Workspace(workdir)
    path = _cache_path(cache, workspace)
    given = _given(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, learning_rate=learning_rate, adapter=adapter,
        weight_decay=weight_decay, warmup_epochs=warmup_epochs, label_smoothing=label_smoothing, mixup=mixup,
        drop_path=drop_path, temporal=temporal, depth=depth, num_heads=heads, adapter_width=adapter_width, ema=ema,
        clip_grad=clip_grad, seed=seed, allow_partial=allow_partial, device=device, precision=precision,
    )  # fmt: skip
    name = run or default_run_name(TrainConfig(cache=path, run=workspace.runs, **given))
    config = TrainConfig(cache=path, run=_below(workspace.runs, name, ""), **given)
    _print_settings("train-temporal", vars(config) | {"warmup_epochs": config.resolved_warmup_epochs})
    result = train(config)
    best = ", ".join(
        f"{key} {value:.2%}" for key, value in result.best.items() if "top" in key and value is not None
    )
    print(
        f"trained on {result.num_clips} clips ({result.num_left_out} left out); best epoch: {best or 'not validated'}"
    )
    print(f"run: {result.run}\nnext: vivit evaluate --run {result.run}")


@app.command(
    epilog="[b]Examples:[/] vivit evaluate\n\nvivit evaluate --run vivit-work/runs/mine --split test --average softmax"
)
def evaluate(
    run: Run = None,
    cache: Cache = None,
    split: Annotated[
        str | None, typer.Option(help="validation or test. [dim]Default: validation.[/]")
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help="What is averaged over views: logits or softmax. [dim]Default: logits.[/]"),
    ] = None,
    max_views: Annotated[
        int | None, typer.Option(help="Use the first views only (views are ordered crop by crop).")
    ] = None,
    allow_partial: AllowPartial = False,
    device: Device = None,
    precision: Precision = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Multi-view accuracy of a run, with the clips it covers. Without --run the newest one is taken."""
    from vivit.pipeline.workspace import Workspace
    from vivit.stage2_temporal.evaluate import EvaluateConfig
    from vivit.stage2_temporal.evaluate import evaluate as run_evaluate
    from vivit.stage2_temporal.run_folder import cache_of

    workspace = Workspace(workdir)
    run_path = _below(workspace.runs, run, "") if run else _say("newest run", workspace.newest_run())
    cache_path = _cache_path(cache, workspace) if cache else _say("cache of the run", cache_of(run_path))
    config = EvaluateConfig(
        run=run_path,
        cache=cache_path,
        **_given(split=split, average=average, max_views=max_views, allow_partial=allow_partial, device=device, precision=precision),
    )  # fmt: skip
    _print_settings("evaluate", vars(config))
    _print_evaluation(run_evaluate(config))


def _clips(
    dataset: str | None,
    manifest: Path | None,
    data_root: Path | None,
    annotations: Path | None,
    workspace: Any,
) -> "tuple[Manifest, Path]":
    """The manifest that was asked for, and the folder of its videos."""
    from vivit.pipeline.datasets import read_dataset
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.manifest import Manifest

    if (dataset is None) == (manifest is None):
        raise ConfigError("pass either --dataset NAME (ek100, folder) or --manifest FILE")
    if manifest is not None:
        return Manifest.read(manifest), data_root or manifest.resolve().parent
    assert dataset is not None
    clips, root = read_dataset(dataset, data_root, annotations)
    clips.write(workspace.manifests / f"{clips.dataset}.parquet")
    return clips, root


def _views(dataset: str, **given: Any) -> Any:
    """The data set's views, with what was given on the command line in their place."""
    from dataclasses import replace

    from vivit.pipeline.recipes import recipe_of

    recipe = recipe_of(dataset)
    print(f"defaults of views: {recipe.source}")
    return replace(recipe.views, **_given(**given))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: everything else keeps the default of its class."""
    return {name: value for name, value in options.items() if value is not None}


def _below(folder: Path, name: str, suffix: str) -> Path:
    """`name` below `folder`, unless it is a path: one with a separator."""
    if os.sep in name:
        return Path(name)
    return folder / (name if name.endswith(suffix) else name + suffix)


def _cache_path(cache: str | None, workspace: Any) -> Path:
    return (
        _below(workspace.caches, cache, ".zarr") if cache else _say("newest cache", workspace.newest_cache())
    )


def _say(what: str, path: Path) -> Path:
    print(f"{what}: {path}")
    return path


def _print_settings(command: str, settings: "dict[str, Any]") -> None:
    import textwrap

    text = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    print(
        f"{command} with\n"
        + textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    )


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_manifest(manifest: "Manifest", root: Path) -> None:
    missing = manifest.missing_videos(root)
    rows = []
    for split in manifest.splits:
        clips = manifest.of_split(split)
        rows.append([split, str(len(clips)), str(len({clip.video for clip in clips}))])
    _table(f"{manifest.dataset} in {root}", ["split", "clips", "videos"], rows)
    print(
        "heads: "
        + (", ".join(f"{head} ({len(names)} classes)" for head, names in manifest.heads.items()) or "none")
    )
    if missing:
        shown = "".join(f"\n  {video}" for video in missing[:20])
        print(f"{len(missing)} videos are missing:{shown}" + ("\n  ..." if len(missing) > 20 else ""))


def _print_extracted(summary: "ExtractSummary") -> None:
    from vivit.pipeline.progress import format_duration

    for split, record in summary.failures[:20]:
        print(f"  {record.outcome}: {record.clip_id} ({split}): {record.message}", file=sys.stderr)
    if len(summary.failures) > 20:
        print(f"  ... and {len(summary.failures) - 20} more, in {summary.cache / 'ledger'}", file=sys.stderr)
    total = sum(summary.clips.values())
    _table("outcomes", ["outcome", "clips"], [[name, str(n)] for name, n in summary.outcomes.most_common()])
    if summary.blocks_done:
        rate = summary.crops / summary.seconds
        shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.limits.items())
        print(
            f"{summary.crops} frame crops in {format_duration(summary.seconds)}, {rate:.1f} crops/s (time: {shares})"
        )
    else:
        print("nothing to do: the cache was complete")
    print(f"{summary.cache}: {total} clips, {summary.size_bytes / 1e6:.1f} MB\nnext: vivit train-temporal")


def _print_evaluation(evaluation: "Evaluation") -> None:
    rows = [
        [
            name,
            *(
                "-" if value is None else f"{value:.2%}"
                for value in (s.top1, s.top5, s.mean_class, s.top1_of_all)
            ),
        ]
        for name, s in evaluation.scores.items()
    ]
    coverage = evaluation.coverage
    views = f"{evaluation.num_views} views ({evaluation.average} averaged)"
    title = f"{evaluation.split}: {coverage.num_evaluated} of {coverage.num_clips} clips, {views}"
    if rows:
        _table(title, ["head", "top-1", "top-5", "mean class", "top-1 of all"], rows)
    else:
        print(f"{title}: no labels, so no scores; the logits of each clip are written")
    if coverage.left_out:
        print("left out: " + ", ".join(f"{count} {outcome}" for outcome, count in coverage.left_out.items()))
    print(f"wrote {Path(evaluation.run) / 'evaluation' / evaluation.split}.json and .parquet")


def _print_demo(result: "DemoResult", folder: Path) -> None:
    clips = ", ".join(f"{count} {split} clips" for split, count in result.num_clips.items())
    rows = [
        ["chance", f"{result.chance:.1%}"],
        ["average pooling of the same features", f"{result.average.scores['action'].top1:.1%}"],
        [
            "best possible without the order of frames",
            "50.0%",
        ],  # every class has a twin: itself played backwards
        ["temporal transformer", f"{result.temporal.scores['action'].top1:.1%}"],
    ]
    covered = result.temporal.coverage
    print(clips)
    _table(
        f"accuracy on {covered.num_evaluated} of {covered.num_clips} validation clips", ["", "top-1"], rows
    )
    _table("time", ["stage", "seconds"], [[stage, f"{spent:.1f}"] for stage, spent in result.seconds.items()])
    print(f"in all {sum(result.seconds.values()):.0f} s; videos, cache and runs are in {folder}")


if __name__ == "__main__":
    main()
