"""Results of papers on our modules, with intervals and verdicts: docs/reproductions.md."""
