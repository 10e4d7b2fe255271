"""dora_export.json says what was lost, and warns above 1 %."""

import json

from dora_peft.adapters.export import Record
from dora_peft.adapters.export.record import NAME


def record(**modules):
    return Record("exact", "float16", "base", ["a"], "exact up to rounding of W0", {"rank": 8.0}, modules)


def test_it_is_written_whole(tmp_path):
    path = record(a={"error_over_update": 0.001}).write(tmp_path)
    assert path == tmp_path / NAME
    found = json.loads(path.read_text())
    assert found["statement"] == "exact up to rounding of W0"
    assert found["modules"] == {"a": {"error_over_update": 0.001}}
    assert found["command"] is None


def test_warnings_name_the_worst_module():
    said = record(
        a={"error_over_update": 0.02, "share_lost": 0.0},
        b={"error_over_update": 0.3, "share_lost": 0.5},
        c={"rank": 2.0},
    ).warnings()
    assert said == [
        "error / update is above 1% in 2 of 3 modules, at most 30.00% in 'b'",
        "the share of rows whose c is lost is above 1% in 1 of 3 modules, at most 50.00% in 'b'",
    ]
    assert record(a={"error_over_update": 0.01}).warnings() == []
