"""Flags of train --follow, serve and export that could be left unheard."""

from __future__ import annotations

import pytest

from distmtl.__main__ import main


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--quantize", "int8"), "--follow DIR"),
        (("--full-every", "0"), "--follow DIR"),
        (("--follow", "nowhere", "--full-every", "0"), "name it"),
    ],
)
def test_exports_without_what_makes_them(capsys, flags, words):
    assert main(["train", "configs/synthetic.yaml", *flags]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("train", "c.yaml", "--follow", "d", "--partitions", "0"),
        ("train", "c.yaml", "--follow", "d", "--idle-timeout", "nan"),
        ("serve", "e", "--batch-wait-ms", "nan"),
        ("serve", "e", "--poll-s", "-1"),
    ],
)
def test_numbers_that_are_none(capsys, flags):
    with pytest.raises(SystemExit):
        main(list(flags))
    assert "is not a number" in capsys.readouterr().err


def test_a_path_with_an_equals_sign_is_no_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day=3").mkdir()
    assert main(["serve", "day=3", "--openapi"]) == 1
    assert "day=3 is neither an export nor" in capsys.readouterr().err
