"""The command line: parse, call one function, print. Nothing heavy is imported before a command runs."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vivit.pipeline.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_SOME_CLIPS_FAILED, VivitError

if TYPE_CHECKING:
    from vivit.end_to_end.demo import DemoResult
    from vivit.end_to_end.predict import Prediction
    from vivit.pipeline.checkpoint import Checkpoint
    from vivit.pipeline.manifest import Manifest
    from vivit.pipeline.preparation import DatasetReport
    from vivit.pipeline.recipes import Recipe
    from vivit.pipeline.storage import Location
    from vivit.pipeline.views import ViewSpec
    from vivit.stage1_extract.extract import ExtractSummary
    from vivit.stage1_extract.pack import PackSummary
    from vivit.stage1_extract.verify import VerifyReport
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
_MODEL, _LEARNING = "Model", "Learning"

Workdir = Annotated[
    Path,
    typer.Option(
        envvar="VIVIT_WORKDIR", help="Folder of manifests, caches and runs.", rich_help_panel=_RUNNING
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Feature cache: a path with a /, a URL (s3://, gs://), or a name below WORKDIR/caches.",
        rich_help_panel=_DATA,
    ),
]
Run = Annotated[
    str | None,
    typer.Option(help="Run folder: a path with a /, or a name below WORKDIR/runs.", rich_help_panel=_DATA),
]
Trained = Annotated[
    str | None,
    typer.Option(
        "--run",
        help="Run folder (a path with a /, or a name below WORKDIR/runs), or a model file. [dim]Default: the newest run.[/]",
        rich_help_panel=_DATA,
    ),
]
TrainedRuns = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        help="Run folder (a path with a /, or a name below WORKDIR/runs), or a model file; several times for the mean of runs. [dim]Default: the newest run.[/]",
        rich_help_panel=_DATA,
    ),
]
_DATASETS = (
    "ek100, k400, k600, k700, ssv2, mit, something-else, ucf101, hmdb51, diving48; folder for <class>/<video>, "
    "webdataset for tars, list for the lists of other tools. A variant follows a colon: ucf101:2."
)
Dataset = Annotated[
    str | None,
    typer.Option(help=_DATASETS, rich_help_panel=_DATA),
]
ManifestFile = Annotated[
    str | None,
    typer.Option(
        "--manifest",
        help="Manifest (.parquet or .csv; a file or URL) instead of a data set.",
        rich_help_panel=_DATA,
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Source frames from one frame to the next. [dim]Default: 2.[/]", rich_help_panel=_VIEWS
    ),
]
Fps = Annotated[
    float | None, typer.Option(help="Resample to this rate before the stride.", rich_help_panel=_VIEWS)
]
Resize = Annotated[
    int | None,
    typer.Option(help="Short side before cropping, in pixels. [dim]Default: 256.[/]", rich_help_panel=_VIEWS),
]
CropSize = Annotated[
    int | None,
    typer.Option(help="Side of a crop, in pixels. [dim]Default: 224.[/]", rich_help_panel=_VIEWS),
]
ScaleMin = Annotated[
    float | None,
    typer.Option(
        help="Smallest random scale of a training view. [dim]Default: 0.9.[/]", rich_help_panel=_VIEWS
    ),
]
ScaleMax = Annotated[
    float | None,
    typer.Option(
        help="Largest random scale of a training view. [dim]Default: 1.33.[/]", rich_help_panel=_VIEWS
    ),
]
Augment = Annotated[
    str | None,
    typer.Option(
        help="Change of a training view's pixels: none, reference-colour, reference-randaugment or randaugment "
        "(torchvision's); layers and magnitude as in randaugment-n2-m9. [dim]Default: none.[/]",
        rich_help_panel=_VIEWS,
    ),
]
Flip = Annotated[
    float | None,
    typer.Option(
        help="Probability of mirroring a training view. [dim]Default: 0.5.[/]", rich_help_panel=_VIEWS
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="pretrained (timm's), random, or a file or URL: .safetensors, .pth, .npz. [dim]Default: pretrained.[/]",
        rich_help_panel=_ENCODER,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Clips per step. [dim]Default: 64.[/]", rich_help_panel=_LEARNING)
]
Epochs = Annotated[
    int | None,
    typer.Option(help="Times that each clip is used. [dim]Default: 30.[/]", rich_help_panel=_LEARNING),
]
Optimizer = Annotated[
    str | None, typer.Option(help="adamw or sgd. [dim]Default: adamw.[/]", rich_help_panel=_LEARNING)
]
WeightDecay = Annotated[
    float | None,
    typer.Option(help="Weight decay of the matrices. [dim]Default: 0.05.[/]", rich_help_panel=_LEARNING),
]
WarmupEpochs = Annotated[
    float | None, typer.Option(help="Epochs of linear warm-up; then cosine.", rich_help_panel=_LEARNING)
]
LabelSmoothing = Annotated[
    float | None,
    typer.Option(
        help="Share of each target spread over all classes. [dim]Default: 0.1.[/]", rich_help_panel=_LEARNING
    ),
]
Mixup = Annotated[
    float | None,
    typer.Option(help="Alpha of mixup; 0 is off. [dim]Default: 0.[/]", rich_help_panel=_LEARNING),
]
Ema = Annotated[
    float | None,
    typer.Option(help="Decay of averaged weights. [dim]Default: off.[/]", rich_help_panel=_LEARNING),
]
ClipGrad = Annotated[
    float | None,
    typer.Option(help="Largest norm of the gradient. [dim]Default: 1.[/]", rich_help_panel=_LEARNING),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        help="Parts that a batch goes through the model in: less memory, the same step. [dim]Default: 1.[/]",
        rich_help_panel=_LEARNING,
    ),
]
ValidateEvery = Annotated[
    int | None,
    typer.Option(
        help="Epochs from one validation to the next. [dim]Default: 1.[/]", rich_help_panel=_LEARNING
    ),
]
TrainingSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Seed of initialisation, order and augmentation. [dim]Default: 0.[/]",
        rich_help_panel=_LEARNING,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        help="Start of the temporal half: a model file or run (warm-up, imported, VideoMAE, ...), spatial (the last "
        "blocks of the spatial ViT), or scratch. [dim]Default: scratch.[/]",
        rich_help_panel=_MODEL,
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        help="Blocks of the temporal transformer. [dim]Default: those of --init, else 4.[/]",
        rich_help_panel=_MODEL,
    ),
]
AttentionHeads = Annotated[
    int | None,
    typer.Option(
        "--heads",
        help="Attention heads of the temporal half. [dim]Default: those of --init, else one per 64 channels.[/]",
        rich_help_panel=_MODEL,
    ),
]
MlpRatio = Annotated[
    float | None,
    typer.Option(
        help="Hidden channels of the temporal MLPs, in units of a token's. [dim]Default: those of --init, else 4.[/]",
        rich_help_panel=_MODEL,
    ),
]
AdapterWidth = Annotated[
    int | None,
    typer.Option(
        help="Channels inside the adapter. [dim]Default: a quarter of a token's.[/]", rich_help_panel=_MODEL
    ),
]
JointHead = Annotated[
    bool,
    typer.Option(
        "--joint-head",
        help="A third head over the (verb, noun) pairs seen in training.",
        rich_help_panel=_MODEL,
    ),
]
DecodeThreads = Annotated[
    int | None, typer.Option(help="Threads that decode ahead.", rich_help_panel=_RUNNING)
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder of the videos, or s3://bucket/folder. [dim]Default: VIVIT_DATA_ROOT/<data set>, or data/<data set>.[/]",
        rich_help_panel=_DATA,
    ),
]
Annotations = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of the annotation files, if not found below the data root; or a file, more than once for several.",
        rich_help_panel=_DATA,
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
AnyPath = TypeVar("AnyPath", bound="Location")
_DEFAULT_WORKDIR = Path("vivit-work")
_MOST_LINES = 20
"""Lines of a long list that are printed."""


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
    "vivit prepare ucf101:2 --data-root /data/ucf   [dim]# split 2[/]\n\n"
    "vivit prepare list --data-root my_videos --annotations train.csv --annotations val.csv\n\n"
    "vivit prepare webdataset --data-root s3://bucket/tars"
)
def prepare(
    dataset: Annotated[str, typer.Argument(help=_DATASETS)],
    data_root: DataRoot = None,
    annotations: Annotations = None,
    probe: Annotated[
        int | None, typer.Option(min=0, help="Clips to decode as a test. [dim]Default: 32.[/]")
    ] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not open any video.")] = False,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Make the manifest of a data set from its annotation files, and a report on this copy of it.

    The report, also as JSON and text beside the manifest, has the clips of each split and class, how they differ from
    the official ones, and the videos that are missing, there twice or unreadable. Exit code 3 where there are such.
    """
    from vivit.pipeline.datasets import load_dataset
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.preparation import PROBED_CLIPS, examine
    from vivit.pipeline.recipes import recipe_of

    if no_probe and probe is not None:
        raise ConfigError("pass either --probe N or --no-probe")
    loaded = load_dataset(dataset, _data_root(data_root), annotations)
    count = None if no_probe else PROBED_CLIPS if probe is None else probe
    report = examine(loaded, recipe_of(loaded.dataset.name).views, probe=count)
    _print_report(report)
    _write_report(report, loaded.manifest, workdir)
    if not report.is_whole:
        raise typer.Exit(EXIT_SOME_CLIPS_FAILED)


@app.command(
    epilog="[b]Examples:[/] vivit pack --dataset folder --data-root my_videos --out packed\n\n"
    "vivit pack --dataset ek100 --out packed --resize 256   [dim]# smaller videos, without sound[/]\n\n"
    "vivit extract --manifest packed/manifest.parquet   [dim]# then[/]"
)
def pack(
    out: Annotated[str, typer.Option(help="Folder of the shards, or s3://bucket/folder.")],
    dataset: Dataset = None,
    manifest: ManifestFile = None,
    data_root: DataRoot = None,
    annotations: Annotations = None,
    shard_size_mb: Annotated[
        int | None,
        typer.Option(help="Size in MiB that a shard does not exceed. [dim]Default: 1024.[/]"),
    ] = None,
    max_count: Annotated[
        int | None, typer.Option(help="Most samples in a shard. [dim]Default: all that fit.[/]")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Encode larger videos anew (H.264, no sound), with a short side of so many pixels. "
            "[dim]Default: off, all bytes as they are.[/]"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that encode. [dim]Default: one per core.[/]")
    ] = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Pack the videos of a data set into WebDataset tars, with an index of each and a manifest.

    Every other command reads videos out of these tars in place. The same command again goes on after an interruption,
    and ends with the same bytes.
    """
    from vivit.pipeline.storage import location
    from vivit.pipeline.workspace import Workspace
    from vivit.stage1_extract.pack import PackConfig
    from vivit.stage1_extract.pack import pack as run_pack

    given = _given(shard_size_mb=shard_size_mb, max_count=max_count, resize=resize, threads=threads)
    target = location(out)
    clips, root = _clips(dataset, manifest, data_root, annotations, Workspace(workdir))
    config = PackConfig(data_root=root, out=target, **given)
    _print_settings("pack", vars(config))
    summary = run_pack(config, clips)
    _print_packed(summary)
    if summary.failed:
        raise typer.Exit(EXIT_SOME_CLIPS_FAILED)


@app.command(
    epilog="[b]Examples:[/] vivit pretrain --dataset ek100 --backbone vit_b16 --run warm-up\n\n"
    "vivit pretrain --manifest clips.csv --model factorised-self-attention --tubelet 2\n\n"
    "torchrun --nproc-per-node 4 -m -- vivit pretrain --dataset ek100 --backbone vit_l16   [dim]# 4 GPUs[/]"
)
def pretrain(
    dataset: Dataset = None,
    manifest: ManifestFile = None,
    data_root: DataRoot = None,
    annotations: Annotations = None,
    run: Run = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="fe (Factorised Encoder), joint, factorised-self-attention or factorised-dot-product. [dim]Default: fe.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Image ViT to start from: vit_b16, ... any timm ViT, or a model file. [dim]Default: vit_b16.[/]",
            rich_help_panel=_ENCODER,
        ),
    ] = None,
    weights: Weights = None,
    tubelet: Annotated[
        int | None,
        typer.Option(
            help="Frames that one token looks at. [dim]Default: the backbone's; 1 for an image ViT.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    inflation: Annotated[
        str | None,
        typer.Option(
            help="A tubelet's kernel from an image's: central or average frame. [dim]Default: central.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="First attention of factorised-self-attention: time_space or space_time. [dim]Default: time_space.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    init: Init = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            help="Half that is not trained: none, spatial or temporal. [dim]Default: none.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    depth: Depth = None,
    heads: AttentionHeads = None,
    mlp_ratio: MlpRatio = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="bottleneck, linear, temporal-conv or none. [dim]Default: none.[/]", rich_help_panel=_MODEL
        ),
    ] = None,
    adapter_width: AdapterWidth = None,
    joint_head: JointHead = False,
    drop_path: Annotated[
        float | None,
        typer.Option(
            help="Stochastic depth of the last blocks. [dim]Default: 0.[/]", rich_help_panel=_LEARNING
        ),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames per view. [dim]Default: 8.[/]", rich_help_panel=_VIEWS)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Source frames from one frame to the next. [dim]Default: spans the time of the data set's 32 frames.[/]",
            rich_help_panel=_VIEWS,
        ),
    ] = None,
    fps: Fps = None,
    resize: Resize = None,
    crop_size: CropSize = None,
    scale_min: ScaleMin = None,
    scale_max: ScaleMax = None,
    flip: Flip = None,
    augment: Augment = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    checkpoint_gradients: Annotated[
        bool,
        typer.Option(
            "--checkpoint-gradients",
            help="Compute inner results twice instead of keeping them: less memory, more time.",
            rich_help_panel=_LEARNING,
        ),
    ] = False,
    optimizer: Optimizer = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. [dim]Default: 0.0001.[/]", rich_help_panel=_LEARNING),
    ] = None,
    weight_decay: WeightDecay = None,
    warmup_epochs: WarmupEpochs = None,
    label_smoothing: LabelSmoothing = None,
    mixup: Mixup = None,
    clip_grad: ClipGrad = None,
    ema: Ema = None,
    validate_every: ValidateEvery = None,
    seed: TrainingSeed = None,
    decode_threads: DecodeThreads = None,
    device: Device = None,
    precision: Precision = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Train a whole video model end to end on few frames: the warm-up that both stages start from, and baselines.

    The run serves as --backbone of `extract`, as --init of `train-temporal`, and with `evaluate` and `predict`. The same
    command again goes on after an interruption. A benchmark has defaults of its own, its recipe (docs/recipes.md), which
    is printed; --help shows those of other data sets.
    """
    from dataclasses import replace

    from vivit.end_to_end.config import PretrainConfig, warm_up_views
    from vivit.end_to_end.pretrain import default_run_name
    from vivit.end_to_end.pretrain import pretrain as run_pretrain
    from vivit.pipeline.recipes import recipe_of
    from vivit.pipeline.workspace import Workspace, file_name

    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end); of several processes the first prints
    workspace = Workspace(workdir)
    clips, root = _clips(dataset, manifest, data_root, annotations, workspace)
    backbone = _run_or(backbone or PretrainConfig.backbone, workspace)
    init = None if init is None else _run_or(init, workspace)
    recipe = recipe_of(clips.dataset)
    own_views = _views(recipe, backbone)
    views = replace(
        warm_up_views(own_views, num_frames),
        **_given(
            num_frames=num_frames, stride=stride, fps=fps, resize=resize, crop_size=crop_size, scale_min=scale_min,
            scale_max=scale_max, flip=flip, augment=augment,
        ),
    )  # fmt: skip
    learning = recipe.training_with(
        _given(
            drop_path=drop_path, epochs=epochs, batch_size=batch_size, optimizer=optimizer, learning_rate=learning_rate,
            weight_decay=weight_decay, warmup_epochs=warmup_epochs, label_smoothing=label_smoothing, mixup=mixup,
            clip_grad=clip_grad,
        )
    )  # fmt: skip
    config = PretrainConfig(
        manifest=_manifest_of(clips, manifest, workspace),
        data_root=root,
        run=workspace.runs,
        views=views,
        checkpoint_gradients=checkpoint_gradients,
        **_given(
            model=model, backbone=backbone, weights=weights, tubelet=tubelet, inflation=inflation, order=order, init=init,
            freeze=freeze, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, adapter=adapter, adapter_width=adapter_width,
            accumulate=accumulate, ema=ema, validate_every=validate_every, seed=seed, decode_threads=decode_threads,
            device=device, precision=precision, joint_head=joint_head,
        ),
        **learning,
    )  # fmt: skip
    name = run or default_run_name(config, file_name(clips.dataset))
    config = replace(config, run=_below(workspace.runs, name, ""))
    chosen = vars(config) | {"warmup_epochs": config.resolved_warmup_epochs}
    print(recipe.summary(vars(warm_up_views(own_views)) | dict(recipe.training), chosen | vars(views)))
    _print_settings("pretrain", chosen)
    result = run_pretrain(config)
    print(
        f"trained {result.trained_parameters:,} parameters on {result.num_clips} clips; "
        f"best epoch: {_best(result.best)}"
    )
    print(f"run: {result.run}")
    both = f"vivit extract --backbone {name} ..., then vivit train-temporal --init {name}"
    print(f"next: {both if config.model == 'fe' else f'vivit evaluate --run {result.run}'}")
    if result.left_out:
        listed = ", ".join(f"{count} {outcome}" for outcome, count in result.left_out.items())
        print(f"readings of clips that failed: {listed}", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_CLIPS_FAILED)


@app.command(
    "import-weights",
    epilog="[b]Examples:[/] vivit import-weights vivit_base_k400/checkpoint\n\n"
    "vivit import-weights checkpoint --heads noun=300,verb=97 --output ek100.safetensors\n\n"
    "vivit import-weights vivit-b-16x2-kinetics400/   [dim]# a Hugging Face folder[/]\n\n"
    "vivit import-weights videomae_pretrain_base.pth",
)
def import_weights(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="File or URL, or Hugging Face folder, with the weights.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write. [dim]Default: WORKDIR/weights/<name>.safetensors.[/]"),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="auto, scenic, google (.npz), timm, huggingface or videomae.")
    ] = "auto",
    backbone: Annotated[
        str | None, typer.Option(help="timm id of the ViT, where the file does not tell.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="joint or factorised-dot-product, where the file does not tell.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Split the classifier: noun=300,verb=97. [dim]Default: one head, action.[/]"),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of a crop in pixels, where the file does not tell.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="First attention of factorised-self-attention: time_space or space_time."),
    ] = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Turn published weights into a model file: Scenic (ViViT), Google ViT, timm, Hugging Face ViViT, VideoMAE.

    The file serves as --backbone of `extract` (its spatial half), as --init of `train-temporal` (its temporal half), and
    as --run of `evaluate` and `predict`.
    """
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.local_copy import local_file
    from vivit.pipeline.weights import import_weights as run_import

    path = local_file(source)
    stored = run_import(
        path, kind=kind, backbone=backbone, model=model, heads=_counts(heads), order=order,
        image_size=None if image_size is None else (image_size, image_size),
    )  # fmt: skip
    from vivit.pipeline.workspace import file_name

    name = file_name(path.resolve().name if path.suffix == "" else path.stem)
    if output is not None and ":/" in str(output):
        raise ConfigError(f"--output {output} is a URL: write to a file, and copy it")
    folder = output if output is not None and output.is_dir() else workdir / "weights"
    target = output if output is not None and not output.is_dir() else folder / f"{name}.safetensors"
    stored.write(target)
    _print_imported(stored, target)


@app.command(
    epilog="[b]Examples:[/] vivit extract --dataset ek100 --backbone vit_l16\n\n"
    "vivit extract --dataset folder --data-root my_videos --backbone vit_b16 --train-views 4\n\n"
    "vivit extract --dataset ek100 --backbone vit_l16 --views +4   [dim]# 4 more training views, later[/]\n\n"
    "vivit extract --manifest clips.csv --weights model.safetensors --num-frames 16\n\n"
    "vivit extract --dataset ek100 --workers 4   [dim]# 4 Ray workers on this machine, a GPU each if there are[/]\n\n"
    "vivit extract --dataset ek100 --address head:6379   [dim]# every GPU of a Ray cluster[/]\n\n"
    "vivit extract --manifest packed/manifest.parquet   [dim]# videos in tars, of `vivit pack`[/]\n\n"
    "vivit extract --dataset webdataset --data-root s3://bucket/tars   [dim]# tars of others[/]\n\n"
    "vivit extract --dataset ek100 --part 2/8   [dim]# one of 8 jobs of an array[/]\n\n"
    "vivit extract --dataset ek100 --backbone warm-up   [dim]# the spatial half of the run warm-up[/]"
)
def extract(
    dataset: Dataset = None,
    manifest: ManifestFile = None,
    data_root: DataRoot = None,
    annotations: Annotations = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="vit_ti16, vit_s16, vit_b16, vit_l16, ... or any timm id; or the spatial half of a model file or of a "
            "`pretrain` run. Several times: a cache for each, clips decoded once. [dim]Default: vit_b16.[/]",
            rich_help_panel=_ENCODER,
        ),
    ] = None,
    weights: Weights = None,
    precision: Precision = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Frame crops per forward pass. [dim]Default: 32.[/]", rich_help_panel=_ENCODER),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames per view. [dim]Default: 32.[/]", rich_help_panel=_VIEWS)
    ] = None,
    stride: Stride = None,
    fps: Fps = None,
    resize: Resize = None,
    crop_size: CropSize = None,
    scale_min: ScaleMin = None,
    scale_max: ScaleMax = None,
    flip: Flip = None,
    augment: Augment = None,
    train_views: Annotated[
        int | None,
        typer.Option(help="Random views per training clip. [dim]Default: 1.[/]", rich_help_panel=_VIEWS),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(
            metavar="+N",
            help="Append views to a cache that exists: its training clips then have --train-views and N more. "
            "The old ones stay as they are, and count alone until all new ones are there.",
            rich_help_panel=_VIEWS,
        ),
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
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ray workers, each with the encoder and a block of its own; 0 is this process. "
            "[dim]Default: one per GPU where there are several or with --address, otherwise 0.[/]",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: HOST:PORT, or auto for the one on this machine. [dim]With --workers also RAY_ADDRESS.[/]",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            help="GPUs of each Ray worker; 0.5 lets two share one. [dim]1 where there are GPUs, otherwise 0.[/]",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    torch_threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of the encoder on the CPU. [dim]All cores, shared by the workers; the last bits of features "
            "may depend on it.[/]",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    decode_threads: DecodeThreads = None,
    decode_workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that decode for each block of a Ray worker (it has two), on any node with free cores; 0 is "
            "the worker's own threads. "
            "[dim]Default: 0.[/]",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    clip_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds a clip may take to decode. [dim]Default: 120.[/]", rich_help_panel=_RUNNING
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n: do every n-th block from the i-th on; other processes do the other parts of the same cache. "
            "[dim]Default: all.[/]",
            rich_help_panel=_RUNNING,
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
    log_json: Annotated[
        str | None,
        typer.Option(
            help="File that gets what happens as JSON lines; - is standard error, in the place of the progress "
            "(warnings stay plain lines).",
            metavar="FILE",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    device: Device = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Stage 1: every view of every clip through the frozen encoder, once, into a feature cache.

    The same command again goes on after an interruption, and ends with the same bytes. A benchmark has defaults of its own
    for views and augmentation, its recipe (docs/recipes.md), which is printed; --help shows those of other data sets.
    """
    from dataclasses import replace

    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.recipes import recipe_of
    from vivit.pipeline.workspace import Workspace, file_name
    from vivit.stage1_extract.config import ExtractConfig, describe
    from vivit.stage1_extract.extract import extract_all

    workspace = Workspace(workdir)
    clips, root = _clips(dataset, manifest, data_root, annotations, workspace)
    backbones = [_run_or(name, workspace) for name in backbone or [ExtractConfig.backbone]]
    if len(backbones) > 1 and (cache or weights not in (None, "pretrained", "random")):
        raise ConfigError(
            "--cache and a --weights file belong to one --backbone: leave them out, or give one"
        )
    recipe = recipe_of(clips.dataset)
    configs = []
    for name in backbones:
        default_views = _views(recipe, name)
        spec = replace(
            default_views,
            **_given(
                num_frames=num_frames, stride=stride, fps=fps, resize=resize, crop_size=crop_size, scale_min=scale_min,
                scale_max=scale_max, flip=flip, augment=augment, train_views=train_views, test_clips=test_clips,
                test_crops=test_crops,
            ),
        )  # fmt: skip
        print(recipe.summary(vars(default_views), vars(spec)))
        named = cache or f"{file_name(clips.dataset)}-{file_name(name)}"
        config = ExtractConfig(
            cache=_cache_at(named, workspace),
            data_root=root,
            views=spec,
            more_views=_more(views),
            backbone=name,
            **_given(
                weights=weights, seed=seed, device=device, precision=precision, batch_size=batch_size,
                block_size=block_size, codec=codec, decode_threads=decode_threads, clip_timeout_sec=clip_timeout,
                max_failures=max_failures, retry_failed=retry_failed, part=_part(part), workers=workers,
                address=address, gpus_per_worker=gpus_per_worker, torch_threads=torch_threads,
                decode_workers=decode_workers, log_json=log_json,
            ),
        )  # fmt: skip
        _print_settings("extract", describe(config))
        configs.append(config)
    summaries = extract_all(configs, clips)
    for summary in summaries:
        _print_extracted(summary)
    _print_workers(summaries[0])
    left = [summary.missing for summary in summaries if summary.missing]
    print(f"left to the other parts: {left[0]}" if left else "next: vivit train-temporal")
    if any(summary.failures for summary in summaries):
        raise typer.Exit(EXIT_SOME_CLIPS_FAILED)


@app.command(
    epilog="[b]Examples:[/] vivit verify\n\nvivit verify --cache ek100-vit_l16 --repair\n\n"
    "vivit verify --sample 20 --data-root /data/EPIC-KITCHENS   [dim]# compute 20 clips anew and compare[/]\n\n"
    "vivit verify --json | jq .findings\n\n"
    "Exit codes: 0 the cache is whole; 1 blocks are missing or something is wrong."
)
def verify(
    cache: Cache = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Take what is wrong out of the ledger: the same `vivit extract` command then computes just that anew.",
        ),
    ] = False,
    sample: Annotated[
        int | None,
        typer.Option(
            help="Clips to decode and encode once more, and to compare with what is stored. [dim]Default: 0.[/]",
            rich_help_panel="Sample",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the choice of the sample. [dim]Default: 0.[/]", rich_help_panel="Sample"),
    ] = None,
    data_root: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL of the videos, for --sample. [dim]Default: VIVIT_DATA_ROOT/<data set>, or data/<data set>.[/]",
            rich_help_panel="Sample",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The encoder's weights for --sample. [dim]Default: those that the cache records.[/]",
            rich_help_panel="Sample",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Of the sample's encoder: auto, cpu, cuda or cuda:N.", rich_help_panel="Sample"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that read and hash. [dim]Default: two per core.[/]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Prove a feature cache whole: ledger, manifest, sizes, checksums, numbers, and a sample computed anew.

    Reads every byte of the features. Nothing is changed without --repair.
    """
    import json

    from vivit.pipeline.workspace import Workspace
    from vivit.stage1_extract.verify import VerifyConfig
    from vivit.stage1_extract.verify import verify as run_verify

    workspace = Workspace(workdir)
    path = workspace.newest_cache() if as_json and cache is None else _cache_path(cache, workspace)
    report = run_verify(
        VerifyConfig(
            cache=path,
            repair=repair,
            is_shown=not as_json,
            **_given(
                sample=sample, seed=seed, data_root=_data_root(data_root), weights=weights, device=device,
                threads=threads,
            ),
        )
    )  # fmt: skip
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _print_verified(report)
    if not report.is_whole:
        raise typer.Exit(EXIT_ERROR)


@app.command(
    "train-temporal",
    epilog="[b]Examples:[/] vivit train-temporal\n\nvivit train-temporal --epochs 50 --learning-rate 1e-3 --mixup 0.3\n\n"
    "vivit train-temporal --init warm-up   [dim]# from the temporal half of the run warm-up[/]\n\n"
    "vivit train-temporal --num-frames 8   [dim]# fewer frames than the cache has[/]\n\n"
    "vivit train-temporal --temporal mean   [dim]# average pooling, the baseline[/]\n\n"
    "vivit train-temporal --joint-head   [dim]# EPIC-KITCHENS: actions as pairs, too[/]",
)
def train_temporal(
    cache: Cache = None,
    run: Run = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of each cached view to look at. [dim]Default: all.[/]", rich_help_panel=_DATA
        ),
    ] = None,
    frame_sampling: Annotated[
        str | None,
        typer.Option(
            help="Which frames: stride (spread over the view) or window (neighbours). [dim]Default: stride.[/]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    init: Init = None,
    temporal: Annotated[
        str | None,
        typer.Option(
            help="transformer, or mean for average pooling. [dim]Default: transformer.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    depth: Depth = None,
    heads: AttentionHeads = None,
    mlp_ratio: MlpRatio = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="bottleneck, linear, temporal-conv or none. [dim]Default: bottleneck.[/]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    adapter_width: AdapterWidth = None,
    joint_head: JointHead = False,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    optimizer: Optimizer = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. [dim]Default: 0.0005.[/]", rich_help_panel=_LEARNING),
    ] = None,
    weight_decay: WeightDecay = None,
    warmup_epochs: WarmupEpochs = None,
    label_smoothing: LabelSmoothing = None,
    mixup: Mixup = None,
    drop_path: Annotated[
        float | None,
        typer.Option(
            help="Stochastic depth of the last block. [dim]Default: 0.1.[/]", rich_help_panel=_LEARNING
        ),
    ] = None,
    ema: Ema = None,
    clip_grad: ClipGrad = None,
    validate_every: ValidateEvery = None,
    seed: TrainingSeed = None,
    allow_partial: AllowPartial = False,
    device: Device = None,
    precision: Precision = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Stage 2: train adapter, temporal transformer and heads on a feature cache.

    Without --cache the newest one is taken. The same command again goes on after an interruption.
    """
    from dataclasses import fields

    from vivit.pipeline.recipes import STAGE_2_SOURCE, with_overrides
    from vivit.pipeline.workspace import Workspace
    from vivit.stage2_temporal.config import TrainConfig
    from vivit.stage2_temporal.run_folder import default_run_name
    from vivit.stage2_temporal.train import train

    workspace = Workspace(workdir)
    path = _cache_path(cache, workspace)
    init = None if init is None else _run_or(init, workspace)
    given = _given(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, learning_rate=learning_rate, adapter=adapter,
        weight_decay=weight_decay, warmup_epochs=warmup_epochs, label_smoothing=label_smoothing, mixup=mixup,
        drop_path=drop_path, temporal=temporal, depth=depth, num_heads=heads, adapter_width=adapter_width, ema=ema,
        clip_grad=clip_grad, seed=seed, allow_partial=allow_partial, device=device, precision=precision,
        init=init, mlp_ratio=mlp_ratio, num_frames=num_frames, frame_sampling=frame_sampling, accumulate=accumulate,
        validate_every=validate_every, joint_head=joint_head,
    )  # fmt: skip
    name = run or default_run_name(TrainConfig(cache=path, run=workspace.runs, **given))
    config = TrainConfig(cache=path, run=_below(workspace.runs, name, ""), **given)
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    print(with_overrides(f"recipe of stage 2 ({STAGE_2_SOURCE})", defaults, given))
    _print_settings("train-temporal", vars(config) | {"warmup_epochs": config.resolved_warmup_epochs})
    result = train(config)
    print(
        f"trained on {result.num_clips} clips ({result.num_left_out} left out); best epoch: {_best(result.best)}"
    )
    print(f"run: {result.run}\nnext: vivit evaluate --run {result.run}")


@app.command(
    epilog="[b]Examples:[/] vivit evaluate\n\nvivit evaluate --run vivit-work/runs/mine --split test --average softmax\n\n"
    "vivit evaluate --run k400.safetensors --dataset folder --data-root my_videos   [dim]# straight from videos[/]\n\n"
    "vivit evaluate --run split1 --run split2 --run split3   [dim]# the mean over UCF101's splits[/]\n\n"
    "vivit evaluate --split test --submission test.zip   [dim]# for EPIC-KITCHENS-100's challenge[/]"
)
def evaluate(
    run: TrainedRuns = None,
    cache: Cache = None,
    dataset: Dataset = None,
    manifest: ManifestFile = None,
    data_root: DataRoot = None,
    annotations: Annotations = None,
    split: Annotated[
        str | None, typer.Option(help="validation or test. [dim]Default: validation.[/]")
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help="What is averaged over views: logits or softmax. [dim]Default: logits.[/]"),
    ] = None,
    max_views: Annotated[
        int | None, typer.Option(help="Of a cache, use the first views only (ordered crop by crop).")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="From videos, source frames from one frame to the next. [dim]Default: as trained.[/]"
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="From videos, resample to this rate. [dim]Default: as trained.[/]")
    ] = None,
    resize: Annotated[
        int | None, typer.Option(help="From videos, short side before cropping. [dim]Default: as trained.[/]")
    ] = None,
    test_clips: Annotated[
        int | None, typer.Option(help="From videos, temporal clips per clip. [dim]Default: as trained.[/]")
    ] = None,
    test_crops: Annotated[
        int | None, typer.Option(help="From videos, spatial crops: 1 or 3. [dim]Default: as trained.[/]")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="From videos, the file of a stage-2 run's frozen encoder, if it moved.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Views per forward pass. [dim]Default: 256 of a cache, 16 of videos.[/]"),
    ] = None,
    fusion: Annotated[
        float | None,
        typer.Option(
            help="Of a model with a joint head, its share in the fused score; one half if not given."
        ),
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="EPIC-KITCHENS-100: challenge file to write (.zip).")
    ] = None,
    supervision: Annotated[
        str | None,
        typer.Option(
            help="EPIC-KITCHENS-100: supervision levels of the submission (pre-training, labels, training data), 0 to 5 "
            "each. [dim]Default: 2,3,4.[/]"
        ),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="EPIC-KITCHENS-100: file for the official script to write (.pkl).")
    ] = None,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial",
            help="Use what is there of an incomplete cache; write --submission and --results with clips missing.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    device: Device = None,
    precision: Precision = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Multi-view accuracy of a run or model file, with 95 % intervals and the clips it covers.

    A stage-2 run is evaluated on its cache. A run of `pretrain` is evaluated on its videos, and anything on the videos of
    --dataset or --manifest, where both halves run. EPIC-KITCHENS-100 gets its 12 official numbers.
    """
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.workspace import Workspace
    from vivit.stage2_temporal.evaluate import EvaluateConfig, is_model
    from vivit.stage2_temporal.evaluate import evaluate as run_evaluate
    from vivit.stage2_temporal.run_folder import cache_of

    workspace = Workspace(workdir)
    paths = [_trained(name, workspace) for name in run] if run else [_trained(None, workspace)]
    has_videos = dataset is not None or manifest is not None
    if cache is not None and has_videos:
        raise ConfigError("pass either --cache, or videos with --dataset or --manifest")
    if len(paths) > 1 and (submission or results):
        raise ConfigError("--submission and --results are of one run: pass --run once")
    common = _given(
        split=split, average=average, batch_size=batch_size, device=device, precision=precision, fusion=fusion,
        submission=submission, supervision=supervision, results=results, allow_partial=allow_partial,
    )  # fmt: skip

    def on_videos(path: Path) -> "Evaluation":
        from vivit.end_to_end.evaluate_videos import VideoEvaluateConfig, evaluate_videos
        from vivit.pipeline.datasets.ek100_official import is_ek100
        from vivit.pipeline.recipes import recipe_of

        writes_files = submission is not None or results is not None
        _refuse("on videos", max_views=max_views, allow_partial=(allow_partial and not writes_files) or None)
        clips, root = (
            _clips(dataset, manifest, data_root, annotations, workspace)
            if has_videos
            else _clips_of_run(path, data_root)
        )
        recipe = recipe_of(clips.dataset)
        given = _given(stride=stride, fps=fps, resize=resize, test_clips=test_clips, test_crops=test_crops)
        print(f"views of a model that has none of its own: {recipe.summary(vars(recipe.views), given)}")
        config = VideoEvaluateConfig(
            run=path,
            data_root=root,
            default_views=recipe.views,
            views=given,
            annotations=_one_folder(annotations) if dataset is None or is_ek100(clips.heads) else None,
            **common,
            **_given(backbone=backbone),
        )
        _print_settings("evaluate", config.settings)
        return evaluate_videos(config, clips)

    def on_cache(path: Path) -> "Evaluation":
        _refuse(
            "on a cache", stride=stride, fps=fps, resize=resize, test_clips=test_clips, test_crops=test_crops,
            backbone=backbone,
        )  # fmt: skip
        cache_path = _cache_path(cache, workspace) if cache else _say("cache of the run", cache_of(path))
        config = EvaluateConfig(
            run=path,
            cache=cache_path,
            annotations=_one_folder(annotations),
            **common,
            **_given(max_views=max_views),
        )
        _print_settings("evaluate", config.settings)
        return run_evaluate(config)

    found = []
    for path in paths:
        found.append(on_videos(path) if has_videos or (cache is None and is_model(path)) else on_cache(path))
        _print_evaluation(found[-1], path)
    if len(found) > 1:
        _print_mean(found, paths[0])


@app.command(
    epilog="[b]Examples:[/] vivit predict holiday.mp4\n\n"
    "vivit predict *.mp4 --run k400.safetensors --top 3\n\nvivit predict kitchen.mp4 --start 12.5 --end 14"
)
def predict(
    videos: Annotated[list[str], typer.Argument(help="Videos: files, URLs, or shard.tar::member.")],
    run: Trained = None,
    top: Annotated[int, typer.Option(help="Classes to show per head.")] = 5,
    start: Annotated[float | None, typer.Option(help="Second at which the clip starts.")] = None,
    end: Annotated[float | None, typer.Option(help="Second at which the clip ends.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Source frames from one frame to the next. [dim]Default: as trained.[/]"),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Resample to this rate. [dim]Default: as trained.[/]")
    ] = None,
    test_clips: Annotated[
        int | None, typer.Option(help="Temporal clips. [dim]Default: as trained.[/]")
    ] = None,
    test_crops: Annotated[
        int | None, typer.Option(help="Spatial crops: 1 or 3. [dim]Default: as trained.[/]")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="File of the frozen encoder of a stage-2 run, if it moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per video.")] = False,
    device: Device = None,
    precision: Precision = None,
    workdir: Workdir = _DEFAULT_WORKDIR,
) -> None:
    """Labels for video files, through both halves of a run or model file."""
    from vivit.end_to_end.predict import predict as run_predict
    from vivit.end_to_end.predictor import load_predictor
    from vivit.pipeline.workspace import Workspace

    path = _trained(run, Workspace(workdir), quiet=as_json)
    predictor = load_predictor(
        path, backbone=backbone, **_given(test_clips=test_clips, test_crops=test_crops)
    )
    found = run_predict(
        predictor, videos, top=top, start_sec=start, end_sec=end, **_given(device=device, precision=precision)
    )
    for prediction in found:
        _print_prediction(prediction, as_json=as_json)
    if not all(prediction.record.usable for prediction in found):
        raise typer.Exit(EXIT_SOME_CLIPS_FAILED)


def _clips(
    dataset: str | None,
    manifest: str | None,
    data_root: str | None,
    annotations: list[Path] | None,
    workspace: Any,
) -> "tuple[Manifest, Location]":
    """The manifest that was asked for, and the folder of its videos."""
    from vivit.pipeline.datasets import load_dataset
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.manifest import Manifest
    from vivit.pipeline.storage import location

    if (dataset is None) == (manifest is None):
        raise ConfigError("pass either --dataset NAME (ek100, ssv2, folder, ...) or --manifest FILE")
    if manifest is not None:
        file = location(manifest)
        return Manifest.read(file), _data_root(data_root) or file.resolve().parent
    assert dataset is not None
    loaded = load_dataset(dataset, _data_root(data_root), annotations)
    for name, place in loaded.files.taken.items():
        print(f"{name}: {place}")
    for note in loaded.files.notes:
        print(f"note: {note}")
    loaded.manifest.write(workspace.manifest_of(loaded.manifest.dataset))
    return loaded.manifest, loaded.files.data_root


def _manifest_of(clips: "Manifest", manifest: str | None, workspace: Any) -> "Location":
    """The file that `_clips` read or wrote."""
    from vivit.pipeline.storage import location

    return location(manifest) if manifest else Path(workspace.manifest_of(clips.dataset))


def _data_root(text: str | None) -> "Location | None":
    """The folder or URL that was given."""
    from vivit.pipeline.storage import location

    return None if text is None else location(text)


def _clips_of_run(run: Path, data_root: str | None) -> "tuple[Manifest, Location]":
    """The manifest that a run of `pretrain` was trained on, and the folder of its videos."""
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.manifest import Manifest
    from vivit.pipeline.storage import location
    from vivit.stage2_temporal.run_folder import RunFolder

    if not run.is_dir():
        raise ConfigError(
            f"{run} is a model file: pass the videos with --dataset or --manifest, or a --cache"
        )
    about = RunFolder(run).read_config()
    path = _say("manifest of the run", location(about["manifest"]))
    return Manifest.read(path), location(data_root or about["data_root"])


def _views(recipe: "Recipe", backbone: str) -> "ViewSpec":
    """The recipe's views, with those that a model file was trained on in their place."""
    from dataclasses import replace

    from vivit.pipeline.backbones import is_model_file
    from vivit.pipeline.checkpoint import views_for_spatial
    from vivit.pipeline.local_copy import local_file

    if not is_model_file(backbone):
        return recipe.views
    own = views_for_spatial(local_file(backbone))
    print(f"crops as in {backbone}: " + ", ".join(f"{name} {value}" for name, value in own.items()))
    return replace(recipe.views, **own)


def _run_or(name: str, workspace: Any) -> str:
    """The folder of the run called `name` where there is one, else `name` itself: a word or a path."""
    run = workspace.runs / name
    return str(run) if os.sep not in name and (run / "model.safetensors").is_file() else name


def _one_folder(annotations: list[Path] | None) -> Path | None:
    """The folder with a benchmark's official lists; ConfigError where there are several."""
    if annotations is not None and len(annotations) > 1:
        from vivit.pipeline.errors import ConfigError

        raise ConfigError("the official lists of a benchmark lie in one folder: pass --annotations once")
    return annotations[0] if annotations else None


def _part(text: str | None) -> tuple[int, int] | None:
    """`2/8` as a pair; ConfigError where it is none."""
    from vivit.pipeline.errors import ConfigError

    if text is None:
        return None
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        raise ConfigError(f"--part {text!r} is not of the form 2/8") from None
    return index, count


def _more(text: str | None) -> int:
    """`+4` as 4; ConfigError where it is no such number."""
    import re

    from vivit.pipeline.errors import ConfigError

    if text is None:
        return 0
    if not re.fullmatch(r"\+[1-9][0-9]{0,3}", text):
        raise ConfigError(
            f"--views {text!r} is not of the form +4: it appends that many views to a cache that exists; "
            "a new one gets --train-views"
        )
    return int(text)


def _counts(text: str | None) -> dict[str, int] | None:
    """`noun=300,verb=97` as a mapping; ConfigError where it is none."""
    from vivit.pipeline.errors import ConfigError

    if text is None:
        return None
    try:
        return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"--heads {text!r} is not of the form noun=300,verb=97") from None


def _best(metrics: dict[str, Any]) -> str:
    shown = [f"{key} {value:.2%}" for key, value in metrics.items() if "top" in key and value is not None]
    return ", ".join(shown) or "not validated"


def _trained(run: str | None, workspace: Any, *, quiet: bool = False) -> Path:
    """The run folder or model file that was asked for; the newest run where none was."""
    if run is None:
        newest: Path = workspace.newest_run()
        return newest if quiet else _say("newest run", newest)
    path = _below(workspace.runs, run, "") if Path(run).suffix != ".safetensors" else _on_this_machine(run)
    if path.suffix != ".safetensors":
        return path
    # the weights in a run's folder stand for the run
    return (
        path.parent if path.name == "model.safetensors" and (path.parent / "config.json").is_file() else path
    )


def _refuse(where: str, **options: Any) -> None:
    """ConfigError for an option that has no meaning here, rather than to leave it aside."""
    from vivit.pipeline.errors import ConfigError

    for name in _given(**options):
        raise ConfigError(
            f"--{name.replace('_', '-')} says nothing about an evaluation {where}: leave it out"
        )


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: everything else keeps the default of its class."""
    return {name: value for name, value in options.items() if value is not None}


def _below(folder: Path, name: str, suffix: str) -> Path:
    """`name` below `folder`, unless it is a path: one with a separator."""
    if os.sep in name:
        return _on_this_machine(name)
    return folder / (name if name.endswith(suffix) else name + suffix)


def _on_this_machine(name: str) -> Path:
    """A path; ConfigError for a URL, where only files and folders of this machine will do."""
    from vivit.pipeline.errors import ConfigError
    from vivit.pipeline.storage import location

    path = location(name)
    if not isinstance(path, Path):
        raise ConfigError(f"{path} is a URL, and a run must be on this machine: copy it, or pass a path")
    return path


def _cache_at(cache: str, workspace: Any) -> "Location":
    """Where the cache is that was asked for by name, path or URL."""
    from vivit.pipeline.storage import is_url, location

    return location(cache) if is_url(cache) else _below(workspace.caches, cache, ".zarr")


def _cache_path(cache: str | None, workspace: Any) -> "Location":
    return _cache_at(cache, workspace) if cache else _say("newest cache", workspace.newest_cache())


def _say(what: str, path: AnyPath) -> AnyPath:
    print(f"{what}: {path}")
    return path


def _print_settings(command: str, settings: "dict[str, Any]") -> None:
    import textwrap

    text = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    print(
        f"{command} with\n"
        + textwrap.fill(
            text,
            100,
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
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


def _print_report(report: "DatasetReport") -> None:
    from rich.console import Console

    from vivit.pipeline.report_text import summary

    console = Console(soft_wrap=True)
    for part in summary(report):
        console.print(part, highlight=False)


def _write_report(report: "DatasetReport", manifest: "Manifest", workdir: Path) -> None:
    from vivit.pipeline.report_text import full_text
    from vivit.pipeline.workspace import Workspace, storage_errors, write_atomically

    path = Workspace(workdir).manifest_of(manifest.dataset)
    manifest.write(path)
    with storage_errors(path):
        write_atomically(path.with_suffix(".report.json"), report.to_json())
        write_atomically(path.with_suffix(".report.txt"), full_text(report).encode())
    print(f"wrote {path}, and the report beside it: {path.with_suffix('.report.txt').name}, .json")


def _print_packed(summary: "PackSummary") -> None:
    for video in summary.failed[:20]:
        print(f"  {video.outcome}: {video.video} ({video.num_clips} clips): {video.reason}", file=sys.stderr)
    if len(summary.failed) > 20:
        print(f"  ... and {len(summary.failed) - 20} more videos", file=sys.stderr)
    _table("shards", ["split", "tars"], [[split, str(count)] for split, count in summary.shards.items()])
    kept = f" ({summary.shards_kept} tars were there already)" if summary.shards_kept else ""
    size = f"{summary.size_bytes / 1e6:.1f} MB"
    print(f"{summary.out}: {summary.num_videos} videos with {summary.num_clips} clips, {size}{kept}")
    print(f"next: vivit extract --manifest {summary.manifest}")


def _print_extracted(summary: "ExtractSummary") -> None:
    for split, record in summary.failures[:20]:
        print(f"  {record.outcome}: {record.clip_id} ({split}): {record.message}", file=sys.stderr)
    if len(summary.failures) > 20:
        print(f"  ... and {len(summary.failures) - 20} more", file=sys.stderr)
    total = sum(summary.clips.values())
    _table("outcomes", ["outcome", "clips"], [[name, str(n)] for name, n in summary.outcomes.most_common()])
    print(
        f"{summary.cache}: {total} clips, {summary.size_bytes / 1e6:.1f} MB (of every clip: outcomes.parquet)"
    )


def _print_workers(summary: "ExtractSummary") -> None:
    from vivit.pipeline.progress import format_duration

    if not summary.crops:
        print("nothing to do: " + ("this part was complete" if summary.missing else "the cache was complete"))
        return
    rows = [
        [
            worker["worker"], str(worker["blocks"]), str(worker["clips"]), f"{worker['clips_per_sec']:.2f}",
            f"{worker['crops_per_sec']:.1f}", *(f"{share:.0%}" for share in worker["shares"].values()),
        ]
        for worker in summary.workers
    ]  # fmt: skip
    columns = ["worker", "blocks", "clips", "clips/s", "crops/s", "decode", "encode", "write"]
    _table("workers, and the shares of their time", columns, rows)
    print(
        f"{summary.crops} frame crops in {format_duration(summary.seconds)}, "
        f"{summary.crops / summary.seconds:.1f} crops/s; {summary.advice}"
    )


def _print_verified(report: "VerifyReport") -> None:
    from vivit.pipeline.progress import format_duration

    check = report.check
    rows = [
        [
            split,
            f"{count.blocks - count.missing_blocks} of {count.blocks}",
            str(count.clips - count.missing_clips),
            str(count.without_features),
            str(count.shards),
            f"{count.size_bytes / 1e6:.1f} MB",
            str(count.findings),
        ]
        for split, count in check.splits.items()
    ]
    columns = ["split", "blocks", "clips", "without features", "shards", "read", "findings"]
    _table(f"{report.cache}, read in {format_duration(check.seconds)}", columns, rows)
    _print_first("", [str(finding) for finding in check.findings])
    _print_first("harmless: ", check.leftovers)
    _print_sample(report)
    again = "run the same `vivit extract` command again"
    if report.repaired:
        print(
            f"repaired: {len(report.repaired)} bad entries were taken out of the ledger; {again} to compute just these"
        )
    elif any(finding.ledger for finding in check.findings):
        print(f"to repair: `vivit verify --repair` takes these blocks out of the ledger; then {again}")
    if check.missing:
        print(f"incomplete: {check.missing}; {again} to finish it")
    if report.is_whole:
        print("the cache is whole")


def _print_first(prefix: str, lines: list[str]) -> None:
    """The first lines of many, on stderr."""
    for line in lines[:_MOST_LINES]:
        print(f"  {prefix}{line}", file=sys.stderr)
    if len(lines) > _MOST_LINES:
        print(f"  ... and {len(lines) - _MOST_LINES} more: --json has all", file=sys.stderr)


def _print_sample(report: "VerifyReport") -> None:
    if not report.sample:
        return
    compared = [made for made in report.sample if not made.unread]
    equal = sum(made.is_equal for made in compared)
    near = sum(not made.is_equal and not made.problem for made in compared)
    text = f"sample: of {len(compared)} clips computed anew {equal} are equal bit for bit"
    if near:
        worst = min(made.cosine for made in compared if not made.is_equal and not made.problem)
        error = max(made.max_error for made in compared if not made.problem)
        text += f", {near} as near as another machine comes (cosine {worst:.6f}, largest error {error:.3g})"
    print(text)
    _print_first(
        "not compared: ",
        [f"{made.clip_id} ({made.split}): {made.unread}" for made in report.sample if made.unread],
    )


def _print_imported(stored: "Checkpoint", path: Path) -> None:
    total = sum(tensor.numel() for tensor in stored.tensors.values())
    height, width = stored.spatial.image_size
    half = "temporal" if stored.model == "fe" else "model"
    rows = [
        ["model", stored.model],
        ["spatial ViT", stored.spatial.name],
        ["crop", f"{height} x {width} pixels, {stored.spatial.tubelet} frames per token"],
        *([f"spatial {name}", str(value)] for name, value in stored.spatial.options.items()),
        *([f"{half} {name}", str(value)] for name, value in stored.rest.items() if value is not None),
        ["parameters", f"{total:,} in {len(stored.tensors)} tensors"],
    ]
    print(stored.source)
    _table("", ["", "value"], rows)
    print(f"wrote {path}")


def _print_prediction(prediction: "Prediction", *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    record = prediction.record
    if as_json:
        guesses = {head: [asdict(guess) for guess in found] for head, found in prediction.guesses.items()}
        about = {"video": str(prediction.video), "outcome": record.outcome, "message": record.message}
        print(json.dumps(about | {"num_frames": record.num_frames, "guesses": guesses}))
        return
    note = f" ({record.outcome}: {record.message})" if record.message else ""
    if not record.usable:
        print(f"{prediction.video}: not read{note}", file=sys.stderr)
        return
    rows = [
        [head, guess.name, f"{guess.probability:.1%}"]
        for head, found in prediction.guesses.items()
        for guess in found
    ]
    print(f"{prediction.video}{note}")
    _table("", ["head", "class", "probability"], rows)


def _print_evaluation(evaluation: "Evaluation", run: Path) -> None:
    from vivit.stage2_temporal.evaluate import output_folder

    rows = [
        [
            name,
            str(score.num_clips),
            *(_percent(getattr(score, key), score.intervals.get(key)) for key in _MEASURES),
        ]
        for name, score in evaluation.scores.items()
    ]
    coverage = evaluation.coverage
    views = f"{evaluation.num_views} views ({evaluation.average} averaged)"
    title = f"{evaluation.split}: {coverage.num_evaluated} of {coverage.num_clips} clips, {views}"
    if rows:
        _table(title, ["head", "clips", *_MEASURES.values()], rows)
        print("in brackets: 95 % intervals (bootstrap over clips)")
    else:
        print(f"{title}: no labels, so no scores; the logits of each clip are written")
    if evaluation.fusion is not None and rows:
        print(
            f"fused: {1 - evaluation.fusion:g} of the product of verb and noun, {evaluation.fusion:g} of the joint head"
        )
    if evaluation.official:
        _print_official(evaluation)
    for note in evaluation.notes:
        print(f"note: {note}")
    if coverage.left_out:
        print("left out: " + ", ".join(f"{count} {outcome}" for outcome, count in coverage.left_out.items()))
    print(f"wrote {output_folder(run) / evaluation.split}.json and .parquet")


_MEASURES = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class", "top1_of_all": "top-1 of all"}


def _percent(share: float | None, interval: "list[float] | None" = None) -> str:
    if share is None:
        return "-"
    return f"{share:.2%}" + (f" ({interval[0] * 100:.1f}-{interval[1] * 100:.1f})" if interval else "")


def _print_official(evaluation: "Evaluation") -> None:
    """EPIC-KITCHENS-100's 12 numbers as papers show them."""
    columns = {
        "top-1": "all_{}_accuracy_at_1",
        "top-5": "all_{}_accuracy_at_5",
        "unseen top-1": "unseen_{}_accuracy_at_1",
        "tail top-1": "tail_{}_accuracy_at_1",
    }
    rows = []
    for head in ("verb", "noun", "action"):
        numbers = [evaluation.official.get(name.format(head)) for name in columns.values()]
        rows.append(
            [
                head,
                *(
                    "-" if n is None else _percent(n.percent / 100, [end / 100 for end in n.interval])
                    for n in numbers
                ),
            ]
        )
    _table("EPIC-KITCHENS-100", ["", *columns], rows)


def _print_mean(evaluations: "list[Evaluation]", first: Path) -> None:
    from vivit.stage2_temporal.evaluate import output_folder
    from vivit.stage2_temporal.mean_evaluation import mean_evaluation

    mean = mean_evaluation(evaluations)
    same = "the same clips" if mean.num_clip_sets == 1 else f"{mean.num_clip_sets} different sets of clips"
    rows = [
        [
            head,
            *(_percent(values.get(key)) for key in _MEASURES),
            ", ".join(f"{top1:.2%}" for top1 in mean.top1_of_runs[head]),
        ]
        for head, values in mean.scores.items()
    ]
    if rows:
        _table(
            f"{mean.split}: mean of {len(mean.runs)} runs on {same}",
            ["head", *_MEASURES.values(), "top-1 of each"],
            rows,
        )
    print(f"wrote {mean.write(output_folder(first))}")


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
