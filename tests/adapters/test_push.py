"""Adapters and exports pushed to a Hub on loopback, and every way in which that fails."""

import json

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from push_fixtures import adapter, export

from dora_peft.adapters import UnreadableError
from dora_peft.adapters.export import export as export_adapter
from dora_peft.adapters.push import NotPushedError, push

# PEFT 0.20 only: it looks for the config of a base model without a name
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume"),
    # huggingface_hub's own
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes"),
]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """This process is its client, and logged in; nothing it asks may be unknown to the server."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        assert server.unexpected == []


def contents(server, name):
    return {path: file.content for path, file in server.commit(name)[1].items()}


def test_an_adapter(server, tmp_path):
    folder = adapter(tmp_path / "adapter")
    (folder / "optimizer.pt").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = push(folder, "user/mine", message="First")
    found = contents(server, "user/mine")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert {name: found[name] for name in names} == {name: before[name] for name in names}
    assert set(found) == {*names, "README.md"}
    assert found["README.md"].decode() == done.card
    assert done.files == {name: len(content) for name, content in found.items()}
    assert done.nbytes == sum(done.files.values())
    assert done.url == f"{server.url}/user/mine/commit/{server.commit('user/mine')[0]}"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert any("optimizer.pt" in note for note in done.notes)


def test_a_real_export_and_its_adapter_renamed(server, tmp_path):
    from format_fixtures import llama

    llama().save_pretrained(tmp_path / "base")
    export_adapter(adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out", "exact", command="dora-peft ...")
    done = push(tmp_path / "out", "user/mine", base="user/mine")
    found = contents(server, "user/mine")
    for path in ("base/model.safetensors", "base/config.json", "adapter/adapter_model.safetensors"):
        assert found[path] == (tmp_path / "out" / path).read_bytes()
    config = json.loads(found["adapter/adapter_config.json"])
    written = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config == {**written, "base_model_name_or_path": "user/mine"} != written
    assert "exact up to rounding of W0" in done.card
    assert done.notes == []
    # without a name for the base, which is a folder, that is said
    assert any("adapter_config.json names its base" in note for note in push(tmp_path / "out", "user/mine").notes)


def test_a_dry_run_asks_no_server_and_says_what_would_be_pushed(server, tmp_path, monkeypatch):
    folder = export(tmp_path / "out", "exact")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.delenv("HF_TOKEN")
        planned = push(folder, "user/mine", dry_run=True)
    assert planned.url is None
    assert server.repos == {}
    done = push(folder, "user/mine")
    assert (done.files, done.card, done.notes) == (planned.files, planned.card, planned.notes)
    assert set(contents(server, "user/mine")) == set(planned.files)


def test_pushing_again_replaces_and_keeps_others(server, tmp_path):
    folder = adapter(tmp_path / "adapter")
    (folder / "eval.json").write_text("{}")
    push(folder, "user/mine")
    (folder / "eval.json").unlink()
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + "\n")
    push(folder, "user/mine")
    found = contents(server, "user/mine")
    assert found["adapter_config.json"] == (folder / "adapter_config.json").read_bytes()
    assert "eval.json" in found


def test_a_name_without_its_owner(server, tmp_path):
    done = push(adapter(tmp_path / "adapter"), "mine")
    assert done.repository == "user/mine"
    assert '"user/mine")' in done.card
    assert contents(server, "user/mine")["README.md"].decode() == done.card


def test_private_repositories(server, tmp_path):
    folder = adapter(tmp_path / "adapter")
    push(folder, "user/mine", private=True)
    assert server.private == {"user/mine"}
    push(folder, "user/mine", private=True)
    push(folder, "user/public")
    with pytest.raises(NotPushedError, match="'user/public' is there and public"):
        push(folder, "user/public", private=True)
    assert len(server.repos["user/public"]) == 2


def test_a_pull_request(server, tmp_path):
    folder = adapter(tmp_path / "adapter")
    push(folder, "user/mine")
    before = server.commit("user/mine")
    (folder / "more.json").write_text("{}")
    done = push(folder, "user/mine", create_pr=True)
    assert done.url == f"{server.url}/user/mine/discussions/1"
    assert server.commit("user/mine") == before
    assert "more.json" in server.pull_requests["user/mine"][0]


def refused(folder, error, said, **options):
    with pytest.raises(error, match=said) as caught:
        push(folder, **({"repository": "user/mine"} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/b/c", "'a/b/c' is no repository's name, owner/name or name"),
        ("user/mine@dev", "The branch is named by --revision"),
        ("", "is no repository's name"),
        ("user/..", "is no repository's name"),
        ("https://huggingface.co/user/mine", "is no repository's name"),
    ],
)
def test_names_that_are_none(name, said, server, tmp_path):
    folder = adapter(tmp_path / "adapter")
    refused(folder, ValueError, said, repository=name)
    refused(folder, ValueError, said, base=name)
    assert server.repos == {}


def test_what_is_no_adapter_makes_no_repository(server, tmp_path):
    refused(tmp_path / "none", UnreadableError, "There is no folder")
    refused(tmp_path, UnreadableError, "holds no adapter")
    assert server.repos == {}


def test_without_a_token(server, tmp_path, monkeypatch):
    folder = adapter(tmp_path / "adapter")
    monkeypatch.delenv("HF_TOKEN")
    refused(folder, NotPushedError, "There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(folder, NotPushedError, "The token is not valid")
    assert server.repos == {}


def test_without_a_network(server, tmp_path, monkeypatch):
    folder = adapter(tmp_path / "adapter")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(folder, NotPushedError, "Cannot push to 'user/mine' at http://127.0.0.1:9: .* Is the Hub within reach")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(folder, NotPushedError, "HF_HUB_OFFLINE is set")


def test_an_upload_that_fails_says_why(server, tmp_path, monkeypatch):
    class Forgetful(dict):
        def __setitem__(self, key, value):
            """So that what is uploaded is not what was announced."""

    monkeypatch.setattr(server, "lfs_granted", Forgetful())
    refused(
        adapter(tmp_path / "adapter"),
        NotPushedError,
        "uploading 'adapter_model.safetensors'.*not the object that was announced",
    )


def test_a_branch_that_is_not_there(server, tmp_path):
    said = "There is no such repository or branch of 'user/mine'. The repository has been made and is empty"
    refused(adapter(tmp_path / "adapter"), NotPushedError, said, revision="dev")
    assert contents(server, "user/mine") == {}
    with pytest.raises(NotPushedError) as caught:
        push(tmp_path / "adapter", "user/mine", revision="dev")
    assert "has been made" not in str(caught.value)
