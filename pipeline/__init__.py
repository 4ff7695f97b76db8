"""What the stages agree on: manifest, video, views, feature cache, errors, progress."""
