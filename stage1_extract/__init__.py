"""Stage 1: run the frozen spatial encoder once over every view of every clip."""
