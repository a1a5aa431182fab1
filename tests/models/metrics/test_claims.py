"""What decides a claim, and the page that is made of it."""

import math
import re

import pytest

from models.errors import UserError
from models.files import ROOT
from models.metrics.claims import (
    Claim,
    Claims,
    Comparison,
    Result,
    agrees,
    measured,
    page,
    read_claims,
    read_results,
    results_text,
    update,
    verdict,
)
from models.metrics.records import Record
from models.metrics.table import summarise

CLAIMS, RESULTS = ROOT / "docs/claims/claims.yaml", ROOT / "docs/claims/results.csv"
NAN = math.nan


def result(value, low=NAN, high=NAN, what="psnr", of=""):
    return Result("1.1", what, of, value, low, high, "0", 20, "runs")


def record(item, value, variant="ours", metric="psnr", seed=0, view="", protocol="views", subject=""):
    return Record(protocol, "1", "test", item, view, seed, variant, "", metric, value, subject)


def claims(*comparisons):
    return Claims(
        {"1": "A paper"}, {"a_test": "galatea run a_test.yaml"}, (Claim("1.1", "It is so", "1", comparisons),)
    )


def compared(**options):
    return Comparison(
        **{"what": "psnr", "sign": "+", "pipelines": ("a_test",), "metric": "psnr", "variant": "ours"} | options
    )


class TestThePage:
    def test_is_what_the_committed_numbers_make(self):
        found, results = read_claims(CLAIMS), read_results(RESULTS)
        assert (ROOT / "docs/claims.md").read_text("utf-8") == page(found, results)
        assert RESULTS.read_text("utf-8") == results_text(results, found)

    def test_has_every_claim(self):
        numbers = [claim.number for claim in read_claims(CLAIMS).claims]
        assert numbers == [f"{card}.{i + 1}" for card, n in enumerate((13, 15, 17, 20, 20), 1) for i in range(n)]
        rows = re.findall(r"^\| (\d\.\d+) \|", (ROOT / "docs/claims.md").read_text("utf-8"), re.MULTILINE)
        assert rows == numbers

    def test_names_what_pipelines_make(self):
        """Each variant is a name in one of the pipelines' files; what a stage calls so itself is named here."""
        found = read_claims(CLAIMS)
        for claim in found.claims:
            for one in claim.comparisons:
                said = "".join((ROOT / f"configs/pipelines/{name}.yaml").read_text("utf-8") for name in one.pipelines)
                for name in (one.variant, one.baseline or one.variant) if one.pipelines else ():
                    known = name.split(",")[0]
                    assert known in ("warp", "pairs") or re.search(rf"\b{known}\b", said), (claim.number, name)

    def test_pages_that_numbers_are_carried_from(self):
        for one in read_results(RESULTS):
            assert one.source == "runs" or (ROOT / one.source).is_file(), one

    def test_shows_numbers_and_commands(self):
        text = page(claims(compared(against=0.5)), [result(1.2345, 0.9, 1.5, of="toon")])
        assert "| 1. A paper | 1 | 0 | 0 | 0 |" in text
        assert "psnr (+ 0.5): toon 1.23 [0.9, 1.5] (seed 0; 20 heads) | reproduced | [a_test](" in text
        assert "`galatea run a_test.yaml`" in text
        assert "*psnr (+): not yet* | not measured yet" in page(claims(compared(decides=False)), [])


@pytest.mark.parametrize(
    ("sign", "against", "numbers", "wanted"),
    [
        ("+", 0.0, (1.0, 0.5, 1.5), True),
        ("+", 0.0, (1.0, -0.5, 1.5), False),  # the interval holds 0
        ("-", 0.0, (-1.0, -1.5, -0.5), True),
        ("-", 0.0, (1.0, 0.5, 1.5), False),
        ("not -", 0.0, (-1.0, -2.0, 0.1), True),
        ("not -", 0.0, (-1.0, -2.0, -0.1), False),
        ("not +", 0.0, (0.1, -0.1, 0.2), True),
        ("+", 0.9, (1.0, 0.8, 1.1), False),
        ("+", 0.9, (1.0, NAN, NAN), True),  # no interval: the sign
        ("-", 0.0, (0.0, NAN, NAN), False),
    ],
)
def test_agreement(sign, against, numbers, wanted):
    assert agrees(compared(sign=sign, against=against), result(*numbers)) is wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], "not measured yet"),
        ([(1, 0.5, 2)], "reproduced"),
        ([(1, NAN, NAN)], "reproduced, by sign alone"),
        ([(1, 0.5, 2), (1, -1, 2)], "half: 1 of 2"),
        ([(1, 0.5, 2), (1, -1, 2), (-1, -2, -0.5)], "not reproduced: 1 of 3"),
        ([(1, -1, 2)], "not reproduced"),
    ],
)
def test_verdicts(values, wanted):
    results = [result(*numbers, of=str(i)) for i, numbers in enumerate(values)]
    (claim,) = claims(compared(), compared(what="ours", decides=False)).claims
    assert verdict(claim, [*results, result(-1, -2, -0.5, what="ours")]) == wanted
    (claim,) = claims(compared(), compared(what="ssim")).claims
    assert verdict(claim, results) == (f"{wanted}, in part" if values else wanted)


class TestMeasuring:
    def test_is_the_tables_difference(self):
        """Paired by item, over subjects, seeds of one item together; of the seeds that both have."""
        records = [
            record(
                f"head{i}", 20 + i + 3 * (v == "ours") + (i % 3) * seed + 100 * (seed == 2), v, seed=seed, view="yaw=+0"
            )
            for i in range(6)
            for v in ("ours", "pti")
            for seed in (0, 1, *((2,) if v == "pti" else ()))
        ]
        others = [record("head0", 99.0, view="input"), record("head0", 99.0, metric="ssim", view="yaw=+0")]
        one = compared(baseline="pti", view="yaw=*")
        (found,) = measured(claims(one), {("a_test", "toon"): [*records, *others], ("b_test", "toon"): records[:1]})
        row = next(r for r in summarise([r for r in records if r.seed < 2], "pti") if r.variant == "ours")
        assert row.difference is not None
        assert (found.value, found.low, found.high) == pytest.approx((3.0, row.difference.low, row.difference.high))
        assert (found.claim, found.of, found.seeds, found.heads, found.source) == ("1.1", "toon", "0 1", 6, "runs")

    def test_one_number_a_run_is_paired_by_seed(self):
        records = [
            record("all", {"ours": 1.0, "pti": 2.0}[v] + s * (v == "ours"), v, "kid", s)
            for v in ("ours", "pti")
            for s in (0, 1)
        ]
        one = compared(metric="kid", baseline="pti")
        (found,) = measured(claims(one), {("a_test", ""): records})
        assert (found.value, found.low, found.high, found.heads) == (-0.5, -1.0, 0.0, 0)
        (found,) = measured(claims(one), {("a_test", ""): [r for r in records if not r.seed]})
        assert found.value == -1.0 and math.isnan(found.low)

    def test_values_of_other_runs(self):
        """A style's only, or against another run."""
        runs = {("a_test", of): [record("h", value), record("g", value)] for of, value in (("0.5", 1.0), ("1.0", 3.0))}
        found = measured(claims(compared(baseline="ours", baseline_of="0.5")), runs)
        assert [(one.of, one.value) for one in found] == [("1.0", 2.0)]
        found = measured(claims(compared(of=("0.5",))), runs)
        assert [(one.of, one.value) for one in found] == [("0.5", 1.0)]

    def test_what_is_not_there(self):
        runs = {("a_test", ""): [record("h", 1.0), record("g", NAN)]}
        assert measured(claims(compared(baseline="pti"), compared(what="x", metric="ssim")), runs) == []
        assert measured(claims(compared()), runs)[0].value == 1.0

    def test_protocols_are_not_mixed(self):
        runs = {("a_test", ""): [record("h", 1.0), record("h", 2.0, protocol="others")]}
        with pytest.raises(UserError, match=r"claim 1\.1: psnr: measured by several protocols"):
            measured(claims(compared()), runs)
        assert measured(claims(compared(protocol="views")), runs)[0].value == 1.0

    def test_a_number_is_replaced(self):
        before = [result(1.0), result(2.0, of="toon")]
        assert update(before, [result(3.0)]) == [result(3.0), result(2.0, of="toon")]


BY = "by: [{what: a, sign: '+'}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claims: {'1.1': {words: a, paper: b}}", "not a list of claims: 'by'"),
        ("claims: {'1.1': {words: a, paper: b, by: [{what: a, sign: '>'}]}}", "sign is '>', it must be one of"),
        (
            "claims: {'1.1': {words: a, paper: b, by: [{what: a, sign: '+', colour: red}]}}",
            "not a list of claims: .*colour",
        ),
        (
            "claims: {'1.1': {words: a, paper: b, by: [{what: a, sign: '+'}, {what: a, sign: '-'}]}}",
            "claim 1.1 is compared twice by the same words",
        ),
        (
            "claims: {'1.1': {words: a, paper: b, by: [{what: a, sign: '+', pipelines: [x], metric: m, variant: v}]}}",
            "claim 1.1: no command makes runs of x",
        ),
        (
            "claims: {'1.1': {words: a, paper: b, by: [{what: a, sign: '+', pipelines: [x]}]}}",
            "runs of a pipeline are compared by a metric and a variant",
        ),
    ],
)
def test_one_sentence_for_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "claims.yaml"
    file.write_text(f"papers: {{'1': A}}\ncommands: {{}}\n{text}\n")
    with pytest.raises(UserError, match=message):
        read_claims(file)


def test_results_that_are_none(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("claim,what,of,value,low,high,seeds,heads,source\n1.1,psnr,,much,,,0,20,runs\n")
    with pytest.raises(UserError, match=r"results\.csv, line 2: not a result of a claim"):
        read_results(file)
    with pytest.raises(UserError, match=r"claim 1\.1 does not ask for 'psnr'"):
        results_text([result(1.0)], claims(compared(what="other")))
    file.write_text(results_text([result(1.0), result(0.123456, 0.1, 0.2, of="toon")], claims(compared())))
    assert [(one.value, one.of) for one in read_results(file)] == [(1.0, ""), (0.1235, "toon")]
