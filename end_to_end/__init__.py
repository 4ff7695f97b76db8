"""Both halves together: the demo on generated videos."""
