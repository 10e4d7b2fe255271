"""That nothing of this machine's folders is uploaded."""

import json

from push_fixtures import BASE, record

from dora_peft.adapters.push_names import for_others, renamed


def test_a_record_names_no_folder(tmp_path):
    command = f"dora-peft export {tmp_path}/runs/a --adapter={tmp_path}/b --base '{tmp_path}/my models/llama' --out out"
    made = record("lora", base=f"{tmp_path}/my models/llama", adapters=[f"{tmp_path}/runs/a", BASE], command=command)
    found = for_others(made)
    assert str(tmp_path) not in json.dumps(vars(found))
    assert (found.base, found.adapters) == ("llama", ["a", BASE])
    assert found.command == "dora-peft export a --adapter=b --base llama --out out"
    assert found.modules == made.modules


def test_names_on_the_hub_stay(tmp_path):
    made = record("lora", base=f"{BASE}@v1", adapters=[BASE], command=f"dora-peft export {BASE} --base {BASE}@v1")
    assert for_others(made) == made
    assert for_others(record("lora", command=None)).command is None
    # no shell could read it, and what it names cannot be told
    assert for_others(record("lora", command="dora-peft export '/home")).command is None


def test_a_config_names_a_repository_or_nothing(tmp_path):
    here, there, nothing = (tmp_path / name for name in ("here", "there", "nothing"))
    for path, name in ((here, str(tmp_path / "base")), (there, BASE), (nothing, None)):
        path.write_text(json.dumps({"r": 8, "base_model_name_or_path": name}))
    files = {"adapter_config.json": here}
    found, notes = renamed(files, None, beside=False)
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] is None
    assert "pass --base" in notes[0]
    found, notes = renamed(files, "user/base", beside=False)
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    assert notes == []
    assert "it is base/ beside it" in renamed(files, None, beside=True)[1][0]
    for path in (there, nothing):
        assert renamed({"adapter_config.json": path}, None, beside=False) == ({}, [])
