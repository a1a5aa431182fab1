"""Tidy records, and the table made of them."""

import math

import pytest

from models.errors import UserError
from models.metrics.records import Record, read_records, write_records
from models.metrics.table import bootstrap, markdown, summarise


def record(item="a", variant="full", metric="psnr", value=1.0, **changes) -> Record:
    fields = {"protocol": "p", "version": "1", "split": "test", "view": "", "seed": 0, "feature_network": ""}
    return Record(**{**fields, **changes}, item=item, variant=variant, metric=metric, value=value)


def test_round_trip(tmp_path):
    records = [record(value=1 / 3), record(item='comma, "quote"', value=math.inf), record(view="yaw 12", seed=7)]
    path = write_records(tmp_path, records)
    assert path.name == "metrics.csv" and read_records(tmp_path) == records
    assert math.isnan(read_records(write_records(tmp_path / "b.csv", [record(value=math.nan)]))[0].value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,value\na,1\n", "no column protocol"),
        ("", "no column"),
        ("protocol,version,split,item,view,seed,variant,feature_network,metric,value\np,1,t,a,,0,v,,m,x\n", "line 2"),
        ("protocol,version,split,item,view,seed,variant,feature_network,metric,value\np,1,t\n", "line 2"),
    ],
)
def test_refuses_other_files(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_records(tmp_path / "none.csv")


def test_bootstrap_interval():
    estimate = bootstrap([1.0, 2.0, 3.0, 4.0], seed=1)
    assert estimate.mean == 2.5 and 1 <= estimate.low < 2.5 < estimate.high <= 4
    assert bootstrap([1.0, 2.0, 3.0, 4.0], seed=1) == estimate
    # The interval of a normal sample is close to mean +- 1.96 s / sqrt(n).
    values = [math.sin(i * 12.9898) for i in range(400)]
    s = math.sqrt(sum((v - sum(values) / 400) ** 2 for v in values) / 400)
    wide = bootstrap(values)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * s / 20, rel=0.1)
    assert math.isnan(bootstrap([2.0]).low)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_items_of_one_subject_are_drawn_together():
    heads = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 7.0}
    values, owners = [v for v in heads.values() for _ in range(6)], [name for name in heads for _ in range(6)]
    clustered, alone = bootstrap(values, owners), bootstrap(list(heads.values()))
    # Six copies of a head say no more than one.
    assert (clustered.mean, clustered.low, clustered.high) == (alone.mean, alone.low, alone.high)
    assert (clustered.items, clustered.subjects) == (24, 4) and clustered.high > bootstrap(values).high
    assert math.isnan(bootstrap([1.0, 3.0], ["a", "a"]).low)
    # Unequal numbers: the mean stays that over items, in every resample too.
    assert bootstrap([0.0, 0.0, 3.0], ["a", "a", "b"]).mean == 1.0
    records = [record(f"{style}-{name}", value=v, subject=name) for name, v in heads.items() for style in "xy"]
    (row,) = summarise(records)
    assert "8 of 4 subjects" in markdown([row])


def test_files_without_subjects_are_read(tmp_path):
    path = write_records(tmp_path, [record("a")])
    lines = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert read_records(path) == [record("a")]


def test_views_are_averaged_within_an_item_first():
    records = [record("a", value=0.0), record("b", value=1.0, view="1"), record("b", value=3.0, view="2")]
    (row,) = summarise(records)
    assert row.value.mean == 1.0 and row.value.items == 2 and row.difference is None


def test_paired_difference_removes_the_items_own_level():
    levels = {"a": 10.0, "b": 20.0, "c": 30.0}
    records = [record(item, "base", value=level) for item, level in levels.items()]
    records += [record(item, "ours", value=level + 1) for item, level in levels.items()]
    records += [record("d", "ours", value=100.0)]  # no partner: in the mean, not in the difference
    base, ours = summarise(records, baseline="base")
    assert (base.variant, base.difference) == ("base", None)
    assert ours.value.items == 4 and ours.difference is not None
    assert ours.difference.items == 3 and ours.difference.mean == pytest.approx(1)
    assert ours.difference.excludes_zero
    with pytest.raises(UserError, match="no variant 'x'"):
        summarise(records, baseline="x")


def test_kinds_never_mix_and_bad_values_are_counted():
    records = [
        record(value=1.0),
        record(value=9.0, version="2"),
        record(metric="fid", feature_network="embedded"),
        record(metric="fid", feature_network="inception", value=3.0),
        record("b", value=math.inf),
    ]
    rows = summarise(records)
    assert [(r.version, r.metric, r.feature_network, r.value.mean) for r in rows] == [
        ("1", "fid", "embedded", 1.0),
        ("1", "fid", "inception", 3.0),
        ("1", "psnr", "", 1.0),
        ("2", "psnr", "", 9.0),
    ]
    assert rows[2].dropped == 1
    assert math.isnan(summarise([record(value=math.nan)])[0].value.mean)


def test_markdown():
    text = markdown(summarise([record("a|b", value=0.5), record("c", value=1.5, variant="x|y")], baseline="full"))
    lines = text.splitlines()
    assert len(lines) == 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "measured with" not in lines[0]
