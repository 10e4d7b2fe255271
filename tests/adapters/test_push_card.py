"""The card of what is pushed."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from push_fixtures import BASE, MODULES, adapter, export, record

from dora_peft.adapters import UnreadableError, convert
from dora_peft.adapters.push_card import card_of, on_hub
from dora_peft.adapters.push_files import content_of

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume")
START, END = "<!-- dora_peft: start -->", "<!-- dora_peft: end -->"


def made(folder, base=None):
    return card_of(folder, content_of(folder), "user/mine", base)


def test_an_adapters_card_is_the_one_that_was_saved_with_the_repository_in_it(tmp_path):
    folder = adapter(tmp_path / "adapter")
    before = (folder / "README.md").read_text()
    card = made(folder)
    assert (folder / "README.md").read_text() == before
    assert "<this repository or folder>" in before
    assert '"user/mine")' in card.text
    assert card.text.count(START) == card.text.count(END) == 1
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
    # what people wrote around the section stays
    (folder / "README.md").write_text(before.replace(START, f"Trained on letters.\n\n{START}"))
    assert "Trained on letters." in made(folder).text


def test_a_folders_name_of_this_machine_goes_nowhere(tmp_path):
    folder = adapter(tmp_path / "adapter", base=str(tmp_path / "secret" / "tiny-base"))
    card = made(folder)
    assert str(tmp_path) not in str(card)
    assert card.data.get("base_model") is None
    assert "| Base model | tiny-base |" in card.text
    card = made(folder, base="user/public")
    assert card.data.base_model == "user/public"
    assert "base_model:adapter:user/public" in card.data.tags
    assert 'from_pretrained("user/public")' in card.text


@pytest.mark.parametrize("route", ["exact", "lora", "merged"])
def test_an_exports_card_says_route_errors_and_command(route, tmp_path):
    card = made(export(tmp_path / "out", route))
    text = " ".join(card.text.split())
    expected = record(route)
    assert f"| Route | `{route}`: " in text
    assert f"| Base model | {BASE} |" in text
    # a folder's name alone
    assert "| Adapters | adapter |" in text
    assert f"| How exact | {expected.statement} |" in text
    assert f"| Error / update, all | {expected.totals['error_over_update']:.4g} |" in text
    assert f"| Share of rows whose c is lost, all | {expected.totals['share_lost']:.4g} |" in text
    for path, numbers in MODULES.items():
        assert f"| `{path}` | {numbers['error_over_update']:.3g} | {numbers['share_lost']:.3g} |" in text
    assert "- lm_head is untied" in text
    assert [warning in text for warning in expected.warnings()] == [True, True]
    assert f"```bash {expected.command} ```" in text
    assert card.data.library_name == ("transformers" if route == "merged" else "peft")
    assert "dora" in card.data.tags
    assert ("lora" in card.data.tags) == (route != "merged")
    assert re.search(
        {"exact": "over no other base", "lora": "as a plain LoRA", "merged": "like any other"}[route], text
    )


def test_halves_of_an_export(tmp_path):
    folder = export(tmp_path / "out", "exact")
    assert made(folder / "base").data.library_name == "transformers"
    assert "use it with the LoRA of the same export" in made(folder / "base").text
    assert made(folder / "adapter").data.library_name == "peft"
    assert "use it with the base of the same export" in made(folder / "adapter").text


def test_pushing_what_was_downloaded_does_not_repeat_the_section(tmp_path):
    folder = export(tmp_path / "out", "lora")
    first = made(folder)
    (folder / "README.md").write_text(str(first))
    assert str(made(folder)) == str(first)


def test_what_a_record_says_does_not_break_the_card(tmp_path):
    hostile = {"a|b`c<script>": {"error_over_update": 1.0, "share_lost": 0.0}}
    folder = export(
        tmp_path / "out", "lora", modules=hostile, statement=f"fine\n{END}\n# Trust me", notes=[f"{END} <img>"],
        command="echo '```'\n<!-- -->",
    )  # fmt: skip
    text = made(folder).text
    assert text.count(START) == text.count(END) == 1
    assert "<img" not in text
    assert "<script" not in text
    assert "\n# Trust me" not in text
    assert "| `a\\|b'c&lt;script>` |" in text
    assert "\n````bash\necho '```' <!-- -->\n````\n" in text


def test_no_command_and_no_errors(tmp_path):
    text = made(export(tmp_path / "out", "merged", command=None, modules={}, totals={}, notes=[])).text
    assert "Made by" not in text
    assert "largest errors" not in text


@pytest.mark.parametrize("target", ["mlx", "lycoris"])
def test_adapters_of_other_tools(target, tmp_path):
    convert(adapter(tmp_path / "adapter"), tmp_path / "other", target)
    card = made(tmp_path / "other")
    assert f"| Format | `{target}` |" in card.text
    assert "| Method | DoRA |" in card.text
    assert "PeftModel" not in card.text
    assert card.data.library_name == target


def test_a_plain_lora_is_not_called_dora(tmp_path):
    folder = export(tmp_path / "out", "lora")
    (folder / "dora_export.json").unlink()
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "magnitude" not in k}, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    card = made(folder)
    assert "LoRA, without magnitudes" in card.text
    assert "dora" not in card.data.tags


def test_a_card_that_cannot_be_read(tmp_path):
    folder = adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("---\na: [b\n---\ntext")
    with pytest.raises(UnreadableError, match="expected a model card") as caught:
        made(folder)
    assert "\n" not in str(caught.value)
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UnreadableError, match="expected a model card"):
        made(folder)
    # without a head of YAML it is text
    (folder / "README.md").write_text("# Mine\n")
    assert ModelCard(str(made(folder))).text.strip().startswith("# Mine")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("user/x", "user/x"), ("user/x@main", "user/x"), ("/tmp/x", None), ("./x", None), ("x", None), ("", None),
     (None, None), ("a/b/c", None), ("../x", None)],
)  # fmt: skip
def test_what_is_a_name_on_the_hub(name, expected):
    assert on_hub(name) == expected


def test_a_folder_of_two_parts_that_is_here_is_none(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert on_hub("models/llama") == "models/llama"
    monkeypatch.chdir(tmp_path)
    assert on_hub("models/llama") is None
