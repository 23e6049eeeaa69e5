"""The drifting log: consistent with its own truth on every day, which turns as it says, and not at all at strength 0."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from distmtl.__main__ import main
from distmtl.config_file import load_config
from distmtl.data.dataset import open_dataset
from distmtl.data.drift import LASTING, PASSING, PERIOD, RATE, TASKS, DriftWorld, write_partitions
from distmtl.errors import DistmtlError


def day(of: int, world: DriftWorld | None = None) -> pd.DataFrame:
    return pa.concat_tables([(world or DriftWorld()).block(of, b) for b in range(4)]).to_pandas()


def test_a_seed_gives_the_same_rows():
    block = DriftWorld(3).block(2, 1)
    assert DriftWorld(3).block(2, 1).equals(block)
    for other in (DriftWorld(4).block(2, 1), DriftWorld(3).block(1, 1), DriftWorld(3).block(2, 0), DriftWorld(3, 0.5).block(2, 1)):
        assert not other.equals(block)


@pytest.mark.parametrize("of", [0, 9])
def test_labels_follow_the_truth_of_their_day(of):
    """In every tenth of it; conversions are known where clicked."""
    rows = day(of)
    assert (rows.conversion.notna() == (rows.click == 1)).all()
    for task in TASKS:
        known = rows[rows[task].notna()]
        for low, high in pairwise(np.quantile(known[f"p_{task}"], np.linspace(0, 1, 11))):
            some = known[known[f"p_{task}"].between(low, high)]
            deviation = np.sqrt((some[f"p_{task}"] * (1 - some[f"p_{task}"])).sum())
            assert abs((some[task] - some[f"p_{task}"]).sum()) < 4 * deviation


def test_what_passes_turns_and_what_lasts_stays():
    """Correlation of two days' signals on the same impressions: (LASTING² + PASSING²·cos Δφ) / (LASTING² + PASSING²), but for chance."""
    whole, half = DriftWorld(), DriftWorld(strength=0.5)
    x = whole.impressions(np.random.default_rng(0))
    of = lambda world, d: np.corrcoef(world.signal("click", x, 0), world.signal("click", x, d))[0, 1]  # noqa: E731
    stays = LASTING**2 / (LASTING**2 + PASSING**2)
    assert of(whole, PERIOD // 4) == pytest.approx(stays, abs=0.1)
    assert of(whole, PERIOD // 2) == pytest.approx(2 * stays - 1, abs=0.1)
    assert of(half, PERIOD // 2) == pytest.approx(of(whole, PERIOD // 4))
    still = DriftWorld(strength=0.0)
    assert all((still.probability(t, x, 0) == still.probability(t, x, 7)).all() for t in TASKS)
    assert still.probability("click", x, 0).mean() == pytest.approx(RATE["click"], abs=0.01)
    rates = [whole.probability("click", x, d).mean() for d in range(0, PERIOD, 5)]
    assert max(rates) - min(rates) > 0.1


def test_it_is_written_in_sealed_partitions_with_its_config(tmp_path, capsys):
    assert main(["synth", "--drift", "0.5", "--partitions", "3", "--rows", "60000", "--out", str(tmp_path / "log")]) == 0
    assert "wrote 60,000 rows" in capsys.readouterr().out
    assert sorted(p.parent.name for p in (tmp_path / "log").rglob("_SUCCESS")) == ["day=000", "day=001", "day=002"]
    config = load_config(tmp_path / "log" / "mmoe.yaml")
    assert open_dataset(config.data.train).rows == 60_000 and open_dataset(str(tmp_path / "log/day=001")).rows == 20_000
    rows = pd.read_parquet(tmp_path / "log/day=001/part-00000.parquet")
    pd.testing.assert_frame_equal(rows[:16_384], DriftWorld(0, 0.5).block(1, 0).to_pandas())


def test_options_out_of_range_are_refused(tmp_path, capsys):
    with pytest.raises(DistmtlError, match="drift 11 is not in 0 … 10"):
        DriftWorld(0, 11)
    with pytest.raises(DistmtlError, match="partitions 0 is not in 1 … 50"):
        write_partitions(tmp_path / "log", DriftWorld(), partitions=0, rows=50)
    for options, words in (
        (["--drift", "--users", "5"], "--users says nothing about a --drift log"),
        (["--partitions", "5"], "--partitions says how many days a --drift log has"),
    ):
        assert main(["synth", *options, "--out", str(tmp_path / "log")]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "log").exists()
