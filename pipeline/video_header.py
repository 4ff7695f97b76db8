"""What a video says of itself in its header: cheap, nothing is decoded and no packet is counted."""

from dataclasses import dataclass

from vivit.pipeline.frame_source import frames_of
from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video_location import FrameSource, VideoSource
from vivit.pipeline.video_source import Failure, check_file, first_video_stream, open_container, open_source


@dataclass(frozen=True)
class VideoHeader:
    """The header of a video."""

    container: str
    codec: str
    frame_rate: float | None
    """Average frames a second, as the header says."""
    duration_sec: float | None
    """As the header says; None where it says nothing."""
    width: int
    """As stored, that is before rotation."""
    height: int
    is_truncated: bool
    """Whether the file ends before its container does."""


def read_header(source: VideoSource) -> VideoHeader:
    """The header; Failure where the video cannot be opened."""
    if isinstance(source, FrameSource):
        frames = frames_of(source)
        picture = frames.picture(0)
        if picture is None:
            raise Failure(Outcome.NO_FRAMES, f"{frames.names[0]} cannot be decoded")
        end_sec = frames.timeline.end_sec
        height, width = picture.shape[:2]
        return VideoHeader("frames", "jpg", source.rate, end_sec, width, height, frames.is_cut)
    with open_source(source) as file:
        is_known, is_truncated = check_file(file)
        with open_container(file, is_known=is_known) as container:
            stream = first_video_stream(container)
            rate = stream.average_rate or stream.guessed_rate
            duration_sec = container.duration / 1e6 if container.duration else None
            if stream.duration is not None and stream.time_base is not None:
                duration_sec = float(stream.duration * stream.time_base)
            return VideoHeader(
                container=container.format.name,
                codec=stream.codec_context.name,
                frame_rate=float(rate) if rate else None,
                duration_sec=duration_sec,
                width=stream.codec_context.width,
                height=stream.codec_context.height,
                is_truncated=is_truncated,
            )
