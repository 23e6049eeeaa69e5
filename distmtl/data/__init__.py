"""Parquet → Batch: dataset (which files), order (which rows when), collate (Arrow columns → Rows), reader (all three)."""
