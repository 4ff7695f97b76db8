"""What can become of a clip."""

from enum import StrEnum


class Outcome(StrEnum):
    """What became of a clip. The first four have features; every other is a reason why there are none."""

    OK = "ok"
    SHORT = "short"
    """Fewer frames than a view reaches over, so that views start over from the first frame."""
    PARTIAL = "partial"
    """The file was cut short: features are made of the frames that are left."""
    CORRUPT = "corrupt"
    """The decoder reported damage: features are made of the frames that came out."""

    NOT_FINITE = "not_finite"
    """The encoder gave infinities or NaN."""
    MISSING = "missing"
    EMPTY_FILE = "empty_file"
    NOT_A_VIDEO = "not_a_video"
    PLAYLIST_OR_SCRIPT = "playlist_or_script"
    """A text file that names other files: never followed."""
    UNREADABLE = "unreadable"
    """The file system refused to read it."""
    UNREADABLE_CONTAINER = "unreadable_container"
    NO_VIDEO_STREAM = "no_video_stream"
    NO_FRAMES = "no_frames"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    """The process that read it died, also when it read nothing else."""

    @property
    def usable(self) -> bool:
        """Whether features were made."""
        return self in (Outcome.OK, Outcome.SHORT, Outcome.PARTIAL, Outcome.CORRUPT)

    @property
    def complete(self) -> bool:
        """Whether nothing of the clip was lost."""
        return self in (Outcome.OK, Outcome.SHORT)
