"""Decoded frames as RGB pictures."""

import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from vivit.pipeline.outcome import Outcome
from vivit.pipeline.video_source import Failure

_FLAGS = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)
_MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 7: Colorspace.SMPTE240M, 9: Colorspace.BT2020}
"""AVColorSpace to what PyAV takes; it passes on the other values as they are, and swscale refuses some."""


def quarter_turns(frame: VideoFrame) -> int:
    """Counter-clockwise quarter turns from the stored to the shown picture."""
    return round(frame.rotation / 90) % 4


class PictureConverter:
    """Frames to 8-bit RGB as shown. Keeps FFmpeg's scaler from frame to frame.

    Colour: the frame's own matrix and range where it is tagged; untagged is BT.601, limited range, at every size
    (FFmpeg's default). Without ACCURATE_RND and FULL_CHR_H_INT swscale is 1 to 1.5 levels too dark; chroma is
    interpolated. Alpha is dropped, fields stay interlaced, the sample aspect ratio is ignored, rotation is applied.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def picture(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """[height, width, 3], contiguous."""
        try:
            rgb = self._reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=_MATRICES.get(frame.colorspace, Colorspace.ITU601),
                dst_color_range=ColorRange.JPEG,
                interpolation=_FLAGS,
                threads=1,  # the default, one per core, takes four times as long
            ).to_ndarray()
        except av.error.FFmpegError as error:
            message = f"pictures of format {frame.format.name} cannot be turned into RGB"
            raise Failure(Outcome.NO_FRAMES, message) from error
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns(frame)), dtype=np.uint8)
