"""The ``galatea claims`` verb."""

import shutil

import pytest

from models.errors import UserError
from models.files import ROOT
from models.metrics.records import Record, write_records
from stages.commands.claims import main


@pytest.fixture
def docs(tmp_path):
    shutil.copytree(ROOT / "docs/claims", tmp_path / "docs/claims")
    return tmp_path / "docs"


def run(folder, claim_holds=True, paper=0.4):
    """Scores of a frontal artwork by two methods."""
    folder.mkdir(parents=True)
    records = [
        Record(
            "artform-multiview", "1", "test", f"toon-{i}", view, 0, variant, "embedded", "lpips@face", value + i, str(i)
        )
        for i in range(20)
        for view in ("yaw=-36", "yaw=+12")
        for variant, value in (("pti", 0.5), ("paper", paper if claim_holds else 0.6))
    ]
    write_records(folder, records)
    (folder / "logs").mkdir()
    (folder / "logs" / "metrics.csv").write_text("epoch,step,loss\n0,1,2.5\n")
    return folder


def row(docs, number):
    return next(
        line for line in (docs / "claims.md").read_text("utf-8").splitlines() if line.startswith(f"| {number} |")
    )


def test_nothing_new_changes_nothing(docs, capsys):
    main(["--docs", str(docs)])
    for name in ("claims.md", "claims/results.csv"):
        assert (docs / name).read_bytes() == (ROOT / "docs" / name).read_bytes()
    assert "0 of " in capsys.readouterr().out


def test_a_run_decides(docs, tmp_path):
    main([str(run(tmp_path / "artform_paper_test")), "--docs", str(docs)])
    assert "search and losses (-): -0.1 [-0.1, -0.1] (seed 0; 20 heads)<br>" in row(docs, "1.1")
    assert "reproduced, in part" in row(docs, "1.1")
    main([f"artform_paper_test={run(tmp_path / 'another', claim_holds=False)}", "--docs", str(docs)])
    assert "| not reproduced, in part |" in row(docs, "1.1")
    assert "search and losses (-): 0.1 [" in row(docs, "1.1")
    main([f"artform_paper_test:toon={tmp_path / 'artform_paper_test'}", "--docs", str(docs)])
    assert "; toon -0.1 [-0.1, -0.1] (seed 0; 20 heads)<br>" in row(docs, "1.1")
    assert "half: 1 of 2" in row(docs, "1.1")


def test_the_page_has_the_digits_that_are_kept(docs, tmp_path):
    """-.0205549 is kept as -.02055, which is -.0205 on the page, now and when it is made again."""
    main([str(run(tmp_path / "artform_paper_test", paper=0.4794451)), "--docs", str(docs)])
    page = (docs / "claims.md").read_bytes()
    assert "search and losses (-): -0.0205 [" in row(docs, "1.1")
    main(["--docs", str(docs)])
    assert (docs / "claims.md").read_bytes() == page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing_test={tmp}"], "no claim is decided by runs of nothing_test, there are: artform_paper_test"),
        (["artform_paper_test={tmp}/empty"], r"there is no metrics\.csv of a test in .*empty"),
        (["--unknown"], "unrecognized arguments"),
        (["--docs", "{tmp}/empty"], r"claims\.yaml"),
    ],
)
def test_one_sentence_for_what_is_wrong(docs, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        main(["--docs", str(docs), *(word.format(tmp=tmp_path) for word in words)])
