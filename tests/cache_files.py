"""What of a cache has to be equal, byte for byte."""

from pathlib import Path


def files_of(cache: Path) -> dict[str, bytes]:
    """Every file of the arrays, and their descriptions, by its path in the cache."""
    return {
        p.relative_to(cache).as_posix(): p.read_bytes()
        for p in sorted(cache.glob("*/features/**/*"))
        if p.is_file()
    }
