"""What a data set is to vivit, and the files that a reader of one works from."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vivit.pipeline.datasets.annotation_files import sha256_of
from vivit.pipeline.datasets.tree import FileTree, VideoFinder
from vivit.pipeline.errors import DataError
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.storage import Location


@dataclass
class DatasetFiles:
    """The files of one data set: a reader finds its annotation files and videos here, and says what it met."""

    name: str
    """As asked for: `ucf101`, or `ucf101:2` for a variant."""
    data_root: Location
    """Folder that the paths of videos start from (a URL for the readers that take one)."""
    annotations: Sequence[Path] = ()
    """Folders or files of annotations; empty to look below the data root."""
    variant: str = ""
    """Which of the data set's variants is wanted."""
    taken: dict[str, str] = field(default_factory=dict)
    """What was found where, for the user."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of this copy."""
    sources: dict[str, str] = field(default_factory=dict)
    """sha256 of each annotation file that was used."""
    repeated_videos: dict[str, list[str]] = field(default_factory=dict)
    """Videos that are there more than once: the one that was taken, and the others."""

    @property
    def root(self) -> Path:
        """The data root, which is a folder."""
        assert isinstance(self.data_root, Path)
        return self.data_root

    @cached_property
    def tree(self) -> FileTree:
        """All files below the data root."""
        return FileTree(self.root)

    @cached_property
    def videos(self) -> VideoFinder:
        """All videos below the data root."""
        return VideoFinder(self.tree.files, repeated=self.repeated_videos)

    @cached_property
    def _annotation_trees(self) -> list[FileTree]:
        folders = [path for path in self.annotations if not path.is_file()]
        if missing := [path for path in folders if not path.is_dir()]:
            raise DataError(f"{missing[0]} does not exist: pass the folder of the annotation files")
        return [FileTree(folder) for folder in folders] if self.annotations else [self.tree]

    def find(self, *names: str) -> Path | None:
        """The annotation file of the first of these names that is there; a name may begin with folders.

        It is looked for in and below the folders; the one nearest to the top counts.
        """
        for name in names:
            given = [path for path in self.annotations if path.is_file() and path.name == name]
            near = [tree.root / file for tree in self._annotation_trees if (file := tree.nearest(name))]
            if found := [*given, *near]:
                return self._take(found[0])
        return None

    def need(self, *names: str, what: str) -> Path:
        """As `find`; DataError where none of them is there. `what` says what the file holds."""
        path = self.find(*names)
        if path is None:
            raise self.not_found(names, what)
        return path

    def not_found(self, names: Iterable[str], what: str) -> DataError:
        """An error that says what was looked for, where, and what to do."""
        looked = ", ".join(map(str, self.annotations)) or str(self.data_root)
        return DataError(
            f"no {what}: {' or '.join(names)} is not in or below {looked}. Pass --annotations FOLDER, the folder of "
            f"the annotation files of {self.name}, and --data-root FOLDER, the folder of its videos"
        )

    def all_named(self, suffix: str) -> list[Path]:
        """All annotation files whose names end so, sorted by name."""
        given = [path for path in self.annotations if path.is_file() and path.name.endswith(suffix)]
        names = {
            (tree, name) for tree in self._annotation_trees for name in tree.by_name if name.endswith(suffix)
        }
        near = [tree.root / file for tree, name in names if (file := tree.nearest(name))]
        return sorted([*given, *near], key=lambda path: path.name)

    def take(self, paths: Iterable[Path]) -> None:
        """Note annotation files that are used."""
        for path in paths:
            self._take(path)

    def _take(self, path: Path) -> Path:
        self.taken[path.name] = str(path)
        self.sources[path.name] = sha256_of(path)
        return path

    def manifest(self, clips: Iterable[Clip], heads: Mapping[str, Sequence[str]]) -> Manifest:
        """The manifest of these clips; rows that stand in the files more than once count once."""
        rows: dict[tuple[str, str], Clip] = {}
        repeated: Counter[str] = Counter()
        kept: list[Clip] = []
        for clip in clips:
            known = rows.setdefault((clip.split, clip.clip_id), clip)
            if known is clip or known != clip:
                kept.append(clip)
            else:
                repeated[clip.clip_id] += 1
        if repeated:
            first = next(iter(repeated))
            self.notes.append(
                f"{repeated.total()} rows stand in the files more than once, for example {first}"
            )
        if not kept:
            raise DataError(
                f"the annotation files of {self.name} have no rows: {', '.join(self.taken.values())}"
            )
        return Manifest(self.name, kept, heads=heads, sources=self.sources)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set that can be asked for by name. Others add theirs as an entry point of the group `vivit.datasets`."""

    name: str
    read: Callable[[DatasetFiles], Manifest]
    """Makes the manifest; raises DataError that says what was looked for."""
    title: str = ""
    """As people call it."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Variant -> what it is; asked for as `name:variant`, without one the first."""
    official: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Variant -> split -> rows of the official files, where they are known."""
    takes_urls: bool = False
    """Whether the data root may be a URL."""

    def variant(self, asked: str) -> str:
        """The variant that was asked for, or the default one; DataError for an unknown one."""
        if not asked:
            return next(iter(self.variants), "")
        if asked not in self.variants:
            known = ", ".join(f"{self.name}:{variant} ({what})" for variant, what in self.variants.items())
            raise DataError(f"unknown variant {self.name}:{asked}: known are {known or 'none'}")
        return asked
