"""The ``galatea table`` verb."""

import pytest

from models.errors import UserError
from models.metrics.records import Record, write_records
from stages.commands.table import main


@pytest.fixture
def runs(tmp_path):
    for run, variant in (("one", "pti"), ("two", "full")):
        (tmp_path / run).mkdir()
        values = enumerate((1.0, 2.0, 4.0))
        write_records(
            tmp_path / run,
            [Record("views", "1", "test", str(i), "", 0, variant, "", "psnr", v + len(variant)) for i, v in values],
        )
    return tmp_path


def test_prints_and_writes(runs, capsys):
    main([str(runs), "--baseline", "pti", "--markdown", str(runs / "table.md")])
    out = capsys.readouterr().out
    assert "difference" in out and "1 [1, 1] *" in out
    assert "| views v1 | test | psnr | full | 6.333" in (runs / "table.md").read_text()


def test_chosen_items(runs, capsys):
    main([str(runs), "--item", "[01]"])
    assert "full │ 5.5 [5, 6]" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="none of the 6 values"):
        main([str(runs), "--item", "x*"])


def test_training_logs_of_the_same_name_are_passed_over(runs, capsys):
    (runs / "one" / "logs").mkdir()
    (runs / "one" / "logs" / "metrics.csv").write_text("epoch,step,loss\n0,1,2.5\n")
    (runs / "two" / "metrics.csv").write_text("")
    main([str(runs)])
    assert "pti" in capsys.readouterr().out
    with pytest.raises(UserError, match="no column protocol"):
        main([str(runs / "one" / "logs" / "metrics.csv")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "none"], "no variant 'none'.*full, pti"),
        (["--metric", "lpips"], "none of the 6 values"),
        (["--unknown"], "unrecognized arguments"),
    ],
)
def test_one_sentence_for_what_is_wrong(runs, options, message):
    with pytest.raises(UserError, match=message):
        main([str(runs), *options])


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.csv of a test"):
        main([str(tmp_path)])


def test_names_of_variants_are_text(tmp_path, capsys):
    record = Record("p", "1", "test", "a", "", 0, "[red]x[/]\x1b[31m", "", "psnr", 1.0)
    write_records(tmp_path / "metrics.csv", [record])
    main([str(tmp_path)])
    text = capsys.readouterr().out
    assert r"[red]x[/]\x1b[31m" in text and "\x1b" not in text
