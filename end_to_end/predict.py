"""Labels for videos that belong to no data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vivit.end_to_end.predictor import Predictor
from vivit.end_to_end.video_logits import video_logits
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip
from vivit.pipeline.video_location import is_video_file

ACTION = "action"


@dataclass(frozen=True)
class Guess:
    """One class of one head."""

    name: str
    class_id: int
    """Id of the class; of an action of verb and noun, verb * number of nouns + noun."""
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one video."""

    video: str
    """As it was given."""
    record: ClipRecord
    guesses: Mapping[str, Sequence[Guess]]
    """The likeliest classes of each head, the likeliest first; none where the video could not be read."""


def predict(
    predictor: Predictor,
    videos: Sequence[Path | str],
    *,
    top: int = 5,
    start_sec: float | None = None,
    end_sec: float | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> list[Prediction]:
    """The `top` classes of each head for each video, or for its seconds [start_sec, end_sec), over all test views.

    A video is a file, a URL, or `shard.tar::member`. With heads verb and noun, `action` is their product. DataError for
    a video that is not there.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    if start_sec is not None and end_sec is not None and end_sec <= start_sec:
        raise ConfigError(f"the clip ends at {end_sec} s, before it starts at {start_sec} s")
    predictions = []
    reading = predictor.reading(Path(), device=device, precision=precision)
    for video in map(str, videos):
        if not is_video_file(Path(), video):
            raise DataError(f"{video} is not a file: pass videos")
        clip = Clip(clip_id=video, split="test", video=video, start_sec=start_sec, end_sec=end_sec)
        logits, (record,) = video_logits(predictor.model, [clip], reading)
        guesses = {head: _best(values[0], predictor.names(head), top) for head, values in logits.items()}
        if {"verb", "noun"} <= logits.keys() and ACTION not in logits:
            guesses[ACTION] = _actions(logits, predictor, top)
        predictions.append(Prediction(video, record, guesses))
    return predictions


def _best(logits: npt.NDArray[np.float32], names: Sequence[str], top: int) -> list[Guess]:
    probabilities = _softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:top].tolist()
    return [Guess(names[i], i, float(probabilities[i])) for i in order]


def _actions(logits: Mapping[str, npt.NDArray[np.float32]], predictor: Predictor, top: int) -> list[Guess]:
    verbs, nouns = (_softmax(logits[head][0]) for head in ("verb", "noun"))
    products = np.outer(verbs, nouns).reshape(-1)
    guesses = []
    for index in np.argsort(-products, kind="stable")[:top].tolist():
        verb, noun = divmod(index, len(nouns))
        name = f"{predictor.names('verb')[verb]} {predictor.names('noun')[noun]}"
        guesses.append(Guess(name, index, float(products[index])))
    return guesses


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: npt.NDArray[np.float64] = shifted / shifted.sum()
    return probabilities
