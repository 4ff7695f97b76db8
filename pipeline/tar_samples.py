"""The samples of a WebDataset tar: members with one key, as the webdataset library groups them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vivit.pipeline.tar_index import TarIndex, split_name
from vivit.pipeline.tar_walk import TarMember


@dataclass
class TarSample:
    """Neighbouring members with the same key."""

    key: str
    fields: dict[str, TarMember] = field(default_factory=dict)
    """Members by extension, in small letters."""


@dataclass(frozen=True)
class SampleProblem:
    """Something in a tar that is not what it should be."""

    name: str
    """Key of the sample, or name of a member that belongs to none; empty for the tar itself."""
    reason: str


def samples_of(index: TarIndex) -> tuple[list[TarSample], list[SampleProblem]]:
    """The samples of a tar in order, and what of it is left out and why.

    A key that comes again with the same fields counts once, the first time; members of one key that are not neighbours
    make two half samples for the webdataset library, and none here.
    """
    problems = [SampleProblem("", index.content.damage)] if index.content.damage else []
    problems += _refusals(index)
    samples: dict[str, TarSample] = {}
    scattered: set[str] = set()
    for run in _runs(list(index.members.values())):
        first = samples.setdefault(run.key, run)
        if first is run:
            continue
        if first.fields.keys() & run.fields.keys():
            problems.append(SampleProblem(run.key, "the key is used twice: the first sample counts"))
        else:
            scattered.add(run.key)
    problems += [SampleProblem(key, "its members are not neighbours in the tar") for key in sorted(scattered)]
    return [sample for key, sample in samples.items() if key not in scattered], problems


def _refusals(index: TarIndex) -> list[SampleProblem]:
    """Members that cannot be read, one entry for each key and reason."""
    found = {(split_name(name)[0] or name, reason): None for name, reason in index.content.refused}
    return [SampleProblem(name, reason) for name, reason in found]


def _runs(members: Sequence[TarMember]) -> Iterator[TarSample]:
    """Neighbouring members with one key; a name that has none is passed over, like those that begin with `__`."""
    run: TarSample | None = None
    for member in members:
        key, extension = split_name(member.name)
        if key is None or extension is None or key.rpartition("/")[2].startswith("__"):
            continue
        if run is None or key != run.key or extension.lower() in run.fields:
            if run is not None:
                yield run
            run = TarSample(key)
        run.fields[extension.lower()] = member
    if run is not None:
        yield run
