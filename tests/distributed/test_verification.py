"""The parity gate passes on sound code, and fails when parity is broken."""

import tiny

from distmtl.__main__ import main
from distmtl.config_file import dump_config, parse_config
from distmtl.verification import gate


def write(path, config):
    path.write_text(dump_config(config))
    return str(path)


def test_verify_passes_and_says_what_it_changed(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate, "MAX_TABLE_ROWS", 100)
    config = tiny.config(
        tiny_data,
        tmp_path / "run",
        model={"kind": "mmoe", "expert": [16, 8], "dropout": 0.3},
        optimizer={"tables": {"kind": "adagrad", "lr": 0.1}},
    )
    assert main(["verify", write(tmp_path / "c.yaml", config), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "table 'user' has 100 rows instead of 200" in said and "dropout is off" in said
    for check in ("unsharded = sharded", "1 = 2 workers", "row_wise", "column_wise", "resharded", "uninterrupted = resumed", "evaluate's"):
        assert check in said
    assert "FAIL" not in said and not (tmp_path / "run").exists()


def test_verify_fails_when_ranks_do_not_share_their_gradients(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distmtl.optim.Optimizers._arrived", lambda self, parameter: None)
    monkeypatch.setattr("distmtl.optim.Optimizers.step", lambda self: self.dense.step())
    assert main(["verify", write(tmp_path / "c.yaml", tiny.config(tiny_data, tmp_path / "run"))]) == 1
    assert "FAIL 2 workers agree" in capsys.readouterr().out


def test_dropout_is_off_in_what_an_entire_space_head_is_built_on(tiny_data, tmp_path):
    """Else 1 and 2 workers would drop other columns, and differ."""
    raw = tiny.raw(tiny_data, tmp_path / "run", model={"kind": "esmm", "network": {"kind": "mmoe", "dropout": 0.3}})
    raw["tasks"][1]["parents"] = ["click"]
    small, changes = gate.shrink(parse_config(raw), str(tmp_path))
    assert small.model.network.dropout == 0 and "dropout is off" in changes
