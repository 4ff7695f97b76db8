"""A Ray session for the workers of stage 1: a cluster that runs, or one of our own on this machine.

The only module beside `ray_decode` that imports ray, and only when it is asked to.
"""

import importlib.util
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vivit
from vivit.pipeline.errors import BlockError, ConfigError
from vivit.stage1_extract.config import ExtractConfig

_STORE_BYTES = 512 << 20
"""Ray's object store here: reports and the features of single clips go through it, crops only with decode workers."""
_PROBE_SEC = 5.0
_TOKEN_HINT = "; where it has tokens, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What opens a connection of HTTP/2, which gRPC speaks: the preface and an empty SETTINGS frame."""
_SETTINGS = 4
"""Type of the frame that is answered, in its byte 3."""


@dataclass(frozen=True)
class Placement:
    """How many workers there are, and what each may use."""

    workers: int
    gpus: float
    """GPUs of a worker."""
    cores: int
    """Cores of a worker."""

    @classmethod
    def of(
        cls,
        config: ExtractConfig,
        *,
        gpus: float,
        cores: float,
        nodes: int = 1,
        gpus_of_nodes: Sequence[float] | None = None,
    ) -> "Placement":
        """The placement on machines with so many GPUs and cores; ConfigError for what they do not have.

        `nodes`: those with cores. `gpus_of_nodes`: the GPUs of each machine, since a worker has all of its on one; None
        for a single machine.
        """
        each = config.gpus_per_worker
        if each is None:
            each = 1.0 if gpus and config.device != "cpu" else 0.0
        if config.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {config.device!r} names one GPU: Ray chooses, pass auto, cpu or cuda")
        if (each > 0) != (config.device == "cuda") and config.device != "auto":
            raise ConfigError(
                f"device {config.device!r} with {each:g} GPUs per worker: leave one of the two out"
                if gpus or each
                else "device 'cuda' needs a GPU for each worker, and there is none: pass --device cpu"
            )
        if not each:
            if cores < 1 or not nodes:
                raise ConfigError("no node of the cluster has a core for a worker: add nodes, or GPUs")
            workers = config.workers or nodes
            return cls(workers, 0.0, max(1, int(cores) // workers))
        room = sum(
            int(on_node) // int(each) if each >= 1 else int(on_node) * math.floor(1 / each)
            for on_node in ([gpus] if gpus_of_nodes is None else gpus_of_nodes)
        )
        if not room:
            most = int(gpus if gpus_of_nodes is None else max(gpus_of_nodes, default=0))
            raise ConfigError(
                f"each worker needs {each:g} GPU and {most or 'no'} GPU is there{' on a node' if gpus_of_nodes else ''}: "
                "leave out --gpus-per-worker to run on the CPU"
            )
        workers = config.workers or room
        if workers > room:
            raise ConfigError(
                f"{workers} workers with {each:g} GPU each do not fit on {int(gpus)} GPUs: "
                f"pass --workers {room}, or a smaller --gpus-per-worker"
            )
        return cls(workers, each, max(1, int(cores) // workers))


def for_workers(config: ExtractConfig, placement: Placement) -> ExtractConfig:
    """The configuration as each worker needs it, wherever its current folder is."""
    cuda = placement.gpus > 0
    return replace(
        config,
        cache=config.cache.absolute(),
        data_root=config.data_root.absolute(),
        backbone=_absolute(config.backbone),
        weights=_absolute(config.weights),
        workers=None,
        device="cuda" if cuda else "cpu",
        torch_threads=config.torch_threads or placement.cores,
        decode_threads=config.decode_threads or (placement.cores if cuda else max(1, placement.cores // 2)),
        # Two blocks of a worker are decoded at a time.
        decode_memory_mb=config.decode_memory_mb // 2,
    )


def _absolute(name: str) -> str:
    return os.path.abspath(name) if os.path.exists(name) else name


@contextmanager
def ray_session(config: ExtractConfig) -> Iterator[tuple[Any, Placement]]:
    """Ray itself, connected, and the workers that fit; a session of our own ends with the `with` block."""
    ray = _imported()
    if ray.is_initialized():
        yield ray, placement_on(ray, config)
        return
    address = config.address or "local"
    if address == "local":
        placement = Placement.of(config, gpus=torch.cuda.device_count(), cores=_cores())
        _connect(ray, address, _local_options(config, placement))
        try:
            yield ray, placement
        finally:
            ray.shutdown()
        return
    _check_address(address)
    with tempfile.TemporaryDirectory(prefix="vivit-") as folder:
        code = copy_of_package(Path(folder))
        _connect(ray, address, {"runtime_env": {"py_modules": [str(code)]}})
        try:
            yield ray, placement_on(ray, config)
        finally:
            ray.shutdown()


def copy_of_package(folder: Path) -> Path:
    """The package's own modules below `folder`: what a node needs that has the dependencies and not vivit."""
    root = Path(next(iter(vivit.__path__)))
    copy = folder / "vivit"
    packages = [
        root,
        *(path.parent for path in root.glob("*/__init__.py")),
        *(p.parent for p in root.glob("*/*/__init__.py")),
    ]
    for package in packages:
        target = copy / package.relative_to(root)
        target.mkdir(parents=True, exist_ok=True)
        for module in package.glob("*.py"):
            shutil.copy(module, target)
    return copy


def placement_on(ray: Any, config: ExtractConfig) -> Placement:
    """The placement on a cluster that runs; ConfigError where workers would wait for cores that it does not have."""
    resources = ray.cluster_resources()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = int(resources.get("CPU", 0))
    placement = Placement.of(
        config,
        gpus=resources.get("GPU", 0),
        cores=cores,
        nodes=sum(node.get("CPU", 0) >= 1 for node in alive),
        gpus_of_nodes=[node.get("GPU", 0) for node in alive],
    )
    if placement.gpus:  # nodes without GPUs decode only where they are asked to, with decode_workers
        beside = sum(node.get("CPU", 0) for node in alive if node.get("GPU", 0))
        placement = replace(placement, cores=max(1, int(beside) // placement.workers))
    needed = 0 if placement.gpus else placement.workers
    if needed > cores:
        raise ConfigError(
            f"{placement.workers} workers need a core each and the cluster has {cores}: pass --workers {cores}"
        )
    if config.decode_workers and needed == cores:
        raise ConfigError(
            f"the cluster has {cores} cores and {needed} workers take them all: none is left for --decode-workers"
        )
    return placement


def _imported() -> Any:
    """Ray; ConfigError where it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "workers need Ray, which is not installed: pip install 'vivit[ray]', or --workers 0"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    return ray


def _local_options(config: ExtractConfig, placement: Placement) -> dict[str, Any]:
    """How a session of our own starts."""
    each = config.decode_workers
    num_cpus = max(_cores(), placement.workers * (1 + each))
    wanted = _STORE_BYTES + (placement.workers * config.decode_memory_mb << 20 if each else 0)
    if not any(os.environ.get(f"RAY_AUTH_{name}") for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else ray writes one to the home folder
    memory = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    free = wanted if memory is None else int(memory.f_bsize * memory.f_bavail * 0.9)
    store = max(80 << 20, min(wanted, free))
    return {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": store}


def _connect(ray: Any, address: str, options: dict[str, Any]) -> None:
    """`ray.init`, quietly; BlockError where it fails."""
    with _own_signals():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            hint = "" if address == "local" else _TOKEN_HINT
            reason = str(error).strip().splitlines()[0].split(". ")[0]
            raise BlockError(f"Ray at {address} cannot be used: {reason}{hint}") from error


def _check_address(address: str) -> None:
    """Refuse an address where no head node answers: Ray would wait for minutes."""
    if address in ("local", "auto"):
        return
    source = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "the address"
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(
            f"{source} {address!r} is not HOST:PORT (of the cluster's head node, often port 6379) or auto"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SEC) as connection:
            is_head = os.environ.get("RAY_USE_TLS") == "1" or _speaks_grpc(connection)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from None
    if not is_head:
        raise ConfigError(
            f"what answers at {address} is not the head of a Ray cluster: its port is that of `ray start --head`, often "
            "6379; 8265 belongs to the dashboard and to `ray job submit`"
        )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the other side answers as a gRPC server does."""
    try:
        connection.sendall(_HTTP2_HELLO)
        with connection.makefile("rb") as answers:
            frame = answers.read(9)
    except OSError:  # cut off, or silent for too long
        return False
    return len(frame) == 9 and frame[3] == _SETTINGS


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals: Ray's own for SIGTERM aborts the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
