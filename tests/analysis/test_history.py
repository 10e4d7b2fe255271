"""One record per module and step."""

from dora_peft.analysis.change import Change
from dora_peft.analysis.history import Record, to_history


def test_records_keep_order_step_and_both_changes():
    changes = {"b": Change(0.5, 0.25), "a": Change(1.0, 2.0)}
    history = to_history(7, changes)
    assert [record["module"] for record in history] == ["b", "a"]
    assert history[0] == {"step": 7, "module": "b", "magnitude": 0.5, "direction": 0.25}
    assert all(record.keys() == Record.__annotations__.keys() for record in history)
    assert to_history(0, {}) == []
