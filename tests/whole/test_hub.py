"""Adapters pushed to a Hub and loaded from it, with this package and without.

The client runs in processes of its own, because `huggingface_hub` reads the address of the Hub once, at import: a
worker that imports this module and runs the functions below, and a bare interpreter in which `import dora_peft` fails.
The asserts stay here, where pytest explains them.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, adapters

BASE = "user/tiny-llama"
ADAPTER = "user/tiny-llama-dora"
INPUT_IDS = torch.arange(12).reshape(2, 6)

# Every field that has a value of its own and does not exclude another one is away from its default.
CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "magnitude_only_modules": ["o_proj"],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"up_proj": 6},
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "detach_norm": False,
    "dropout_mode": "paper",
    "task_type": "CAUSAL_LM",
}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits


def perturb(model, seed):
    """Move every adapter tensor, the magnitude included, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            change = 0.2 * noise * parameter if "magnitude" in name else 0.1 * noise
            with torch.no_grad():
                parameter.add_(change)


def push_base_and_adapter():
    """Push the base, then the adapter twice with different weights; return the configuration, shas and logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # Weights ten times the default's size: an adapter that is not applied then shows in the first digit of the logits.
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2))
    base.push_to_hub(BASE)
    # From the Hub, so that the adapter's configuration and model card name the base by its id there.
    base = AutoModelForCausalLM.from_pretrained(BASE)
    base_logits = logits_of(base)
    model = get_peft_model(base, DoraConfig(**CONFIG))
    perturb(model, seed=1)
    first = model.push_to_hub(ADAPTER).oid
    first_logits = logits_of(model)
    perturb(model, seed=2)
    second = model.push_to_hub(ADAPTER).oid
    return SimpleNamespace(
        config=model.peft_config["default"],
        base_logits=base_logits,
        logits={first: first_logits, second: logits_of(model)},
        first=first,
        second=second,
    )


def peft_from_pretrained(revision):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, ADAPTER, revision=revision)
    return model.peft_config["default"], logits_of(model)


def auto_peft_model(revision):
    model = AutoPeftModelForCausalLM.from_pretrained(ADAPTER, revision=revision)
    return model.peft_config["default"], logits_of(model)


def peft_load_adapter(revision):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = get_peft_model(base, DoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    model.load_adapter(ADAPTER, "second", revision=revision)
    model.set_adapter("second")
    return model.peft_config["second"], logits_of(model)


def transformers_load_adapter(revision):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    # `adapter_kwargs` reaches the configuration and the weights in every transformers release that has the method.
    model.load_adapter(ADAPTER, adapter_kwargs={} if revision is None else {"revision": revision})
    return model.peft_config["default"], logits_of(model)


def transformers_load_second_adapter(revision):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.add_adapter(DoraConfig(r=2, target_modules=["k_proj"]), "first")
    # PEFT says so of every second adapter of a transformers model.
    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
    model.load_adapter(ADAPTER, "second", adapter_kwargs={} if revision is None else {"revision": revision})
    model.set_adapter("second")
    return model.peft_config["second"], logits_of(model)


def load_strictly(loader, revision):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 with transformers 5.23, for every adapter of every kind.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return loader(revision)


def commit_status(token):
    """The status of a commit to the adapter's repository with this token, None for a client without one."""
    operation = huggingface_hub.CommitOperationAdd("adapter_config.json", b"{}")
    try:
        huggingface_hub.HfApi(token=token or False).create_commit(ADAPTER, [operation], commit_message="Overwrite")
    except huggingface_hub.errors.HfHubHTTPError as error:
        return error.response.status_code
    return 200


def unknown_endpoint_status():
    try:
        huggingface_hub.HfApi().paper_info("2402.09353")
    except huggingface_hub.errors.HfHubHTTPError as error:
        return error.response.status_code
    return 200


def use_whole_repositories(folder):
    """Upload a folder, ask the client's calls for repositories about it, and download it again."""
    api = huggingface_hub.HfApi()
    api.create_repo("user/folder")
    commit = api.upload_folder(repo_id="user/folder", folder_path=folder, commit_message="Two files")
    unchanged = api.upload_folder(repo_id="user/folder", folder_path=folder, commit_message="The same two files")
    snapshot = Path(huggingface_hub.snapshot_download("user/folder"))
    return {
        "user": api.whoami()["name"],
        "commit": commit.oid,
        "commit of the unchanged folder": unchanged.oid,
        "head": api.model_info("user/folder").sha,
        "files": api.list_repo_files("user/folder"),
        "sizes": {entry.path: entry.size for entry in api.list_repo_tree("user/folder", recursive=True)},
        "exists": [api.file_exists("user/folder", name) for name in ("README.md", "readme", "more/weights.bin")],
        "other repository": api.repo_exists("user/missing"),
        "other revision": api.revision_exists("user/folder", "0" * 40),
        "downloaded": {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*.*")},
    }


def guarded(function, *args):
    """Run in the worker; an error comes back as text, because the Hub's exceptions do not survive pickling."""
    try:
        return function(*args), None
    except Exception:
        return None, traceback.format_exc()


class Client:
    """A process whose Hub is the server at the address in `environment`."""

    def __init__(self, environment):
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            # The process starts with the first call and keeps the environment of that moment.
            self(os.getpid)

    def __call__(self, function, *args):
        result, error = self.pool.submit(guarded, function, *args).result()
        assert error is None, f"in the client process:\n{error}"
        return result


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    # One thread: where other processes use the cores too, a product of these tiny tensors takes 30 ms with two.
    return server.client_environment(tmp_path_factory.mktemp("hf_home")) | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def client(environment):
    client = Client(environment)
    yield client
    client.pool.shutdown()


@pytest.fixture(scope="module")
def pushed(client):
    return client(push_base_and_adapter)


@pytest.fixture(autouse=True)
def no_unexpected_requests(server):
    yield
    unexpected, server.unexpected = server.unexpected, []
    assert unexpected == []


def test_repository_holds_adapter_config_and_card(server, pushed):
    _, files = server.commit(ADAPTER)
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {path for path, file in files.items() if file.lfs} == {"adapter_model.safetensors"}
    tensors = load(files["adapter_model.safetensors"].content)
    modules = [re.sub(r"\.lora_A\.weight$", "", name) for name in tensors if "lora_A" in name]
    assert len(modules) == 2 * (len(CONFIG["target_modules"]) + len(CONFIG["magnitude_only_modules"]))
    assert {f"{module}.lora_magnitude_vector.weight" for module in modules} <= set(tensors)
    config = json.loads(files["adapter_config.json"].content)
    assert (config["peft_type"], config["use_dora"], config["base_model_name_or_path"]) == ("LORA", True, BASE)


@pytest.mark.parametrize("revision", ["main", "first", "second"])
@pytest.mark.parametrize(
    "loader",
    [
        peft_from_pretrained,
        auto_peft_model,
        peft_load_adapter,
        transformers_load_adapter,
        transformers_load_second_adapter,
    ],
)
def test_loads_back_as_dora_config(client, pushed, loader, revision):
    sha = {"main": None, "first": pushed.first, "second": pushed.second}[revision]
    config, logits = client(load_strictly, loader, sha)
    assert type(config) is DoraConfig
    # What is loaded is loaded for inference; everything else is as it was pushed.
    assert config.to_dict() == pushed.config.to_dict() | {"inference_mode": True}
    expected = pushed.logits[sha or pushed.second]
    assert (expected - pushed.base_logits).abs().max() > 0.1
    torch.testing.assert_close(logits, expected)


def info_of(adapter, base):
    return adapters.info(adapter, base=base)


def test_the_command_reads_repositories_and_their_revisions(client, pushed):
    found = {name: client(info_of, f"{ADAPTER}{name}", BASE) for name in ("", f"@{pushed.first}", f"@{pushed.second}")}
    changes = {name: [module.change for module in one.modules] for name, one in found.items()}
    assert changes[""] == changes[f"@{pushed.second}"] != changes[f"@{pushed.first}"]
    assert len(changes[""]) == 8
    assert found[""].base == BASE


def test_a_revision_that_is_not_there(client, pushed, server):
    with pytest.raises(AssertionError, match=r"UnreadableError: 'user/tiny-llama-dora@none' is no folder or file here"):
        client(info_of, f"{ADAPTER}@none", None)


@pytest.mark.parametrize("config_class", [PeftConfig, DoraConfig])
def test_config_alone_from_the_hub(client, pushed, config_class):
    config = client(config_class.from_pretrained, ADAPTER)
    assert type(config) is DoraConfig
    # Lists of module names become sets, as in PEFT.
    expected = {name: set(value) if isinstance(value, list) else value for name, value in CONFIG.items()}
    assert {name: getattr(config, name) for name in CONFIG} == expected


WITHOUT_THE_PACKAGE = """
import sys, warnings
sys.modules["dora_peft"] = None  # makes `import dora_peft` raise ImportError

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base_id, adapter_id, out = sys.argv[1:]
input_ids = torch.arange(12).reshape(2, 6)

def through_transformers():
    model = AutoModelForCausalLM.from_pretrained(base_id)
    model.load_adapter(adapter_id)
    return model

loaders = {
    "PeftModel": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_id), adapter_id),
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter_id),
    "transformers": through_transformers,
}
results = {}
with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    for name, loader in loaders.items():
        model = loader().eval()
        config = model.peft_config["default"]
        results[name] = (type(config).__name__, config.use_dora, model(input_ids).logits)
torch.save(results, out)
"""


def test_loads_without_the_package(environment, pushed, tmp_path):
    out = tmp_path / "results.pt"
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, BASE, ADAPTER, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # transformers reports keys that do not fit through its logger, not as a warning.
    assert "MISSING" not in done.stderr
    assert "UNEXPECTED" not in done.stderr
    results = torch.load(out)
    assert set(results) == {"PeftModel", "AutoPeftModel", "transformers"}
    for config, use_dora, logits in results.values():
        assert (config, use_dora) == ("LoraConfig", True)
        torch.testing.assert_close(logits, pushed.logits[pushed.second])


def test_model_card_says_what_and_how(server, pushed):
    card = huggingface_hub.ModelCard(server.commit(ADAPTER)[1]["README.md"].content.decode())
    assert card.data.base_model == BASE
    assert card.data.library_name == "peft"
    assert BASE in card.text
    assert "DoRA" in card.text
    assert re.search(r"(?i)\b(r|rank)\b\W{1,6}4\b", card.text), card.text
    assert "import dora_peft" in card.text or "from dora_peft import" in card.text
    assert "PeftModel.from_pretrained" in card.text


def test_pushing_again_does_not_repeat_sections(server, pushed):
    cards = [server.commit(ADAPTER, sha)[1]["README.md"].content.decode() for sha in (pushed.first, pushed.second)]
    headings = re.findall(r"^#+ .*$", cards[1], flags=re.MULTILINE)
    assert headings
    assert len(headings) == len(set(headings))
    assert cards[0] == cards[1]


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_commit_without_the_token_is_refused(server, client, pushed, token):
    assert client(commit_status, token) == 401
    assert server.commit(ADAPTER)[0] == pushed.second


def test_client_calls_for_whole_repositories(server, client, tmp_path):
    contents = {"README.md": b"# Two files\n", "more/weights.bin": bytes(range(256)) * 40}
    (tmp_path / "more").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = client(use_whole_repositories, tmp_path)
    head, files = server.commit("user/folder")
    assert found == {
        "user": "user",
        "commit": head,
        "commit of the unchanged folder": head,
        "head": head,
        "files": sorted(contents),
        "sizes": {name: len(content) for name, content in contents.items()},
        "exists": [True, False, True],
        "other repository": False,
        "other revision": False,
        "downloaded": contents,
    }
    assert {path for path, file in files.items() if file.lfs} == {"more/weights.bin"}


def test_server_records_what_it_does_not_know(server, client):
    assert client(unknown_endpoint_status) == 404
    assert server.unexpected == ["GET /api/papers/2402.09353"]
    server.unexpected.clear()
