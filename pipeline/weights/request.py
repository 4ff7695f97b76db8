"""What a user may say about a file of weights that the file does not say itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from vivit.pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of an import; None leaves each to the file."""

    backbone: str | None = None
    """timm id or short name of the spatial ViT."""
    heads: Mapping[str, int] | None = None
    """Classes of each head, in the order in which they share the file's one classifier."""
    image_size: tuple[int, int] | None = None
    """Height and width of a crop in pixels."""
    model: str | None = None
    """One of `checkpoint.MODELS`."""

    def __post_init__(self) -> None:
        if self.image_size is not None and min(self.image_size) < 1:
            raise ConfigError(f"the image size must be at least 1 x 1 pixels, got {by(self.image_size)}")
        for head, classes in (self.heads or {}).items():
            if not head or "." in head:
                raise ConfigError(f"a head cannot be called {head!r}: use a name without a dot")
            if classes < 1:
                raise ConfigError(f"head {head} must have at least 1 class, got {classes}")


def by(sizes: tuple[int, ...]) -> str:
    """Sizes in words: `224 x 224`."""
    return " x ".join(map(str, sizes))
