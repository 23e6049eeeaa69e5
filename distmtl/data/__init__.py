"""Parquet → Batch: dataset (which files), order (which rows when), collate (Arrow columns → tensors), reader (all three)."""
