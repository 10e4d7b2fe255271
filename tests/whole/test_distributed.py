"""Several processes: FSDP2 shards the adapter and gathers it into another storage for every forward pass."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from dora_peft import DoraConfig, norms

WORLD, STEPS, MICRO_BATCHES = 2, 3, 2


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)


def train_sharded(rank: int, folder: Path) -> None:
    """What one of the processes does: trains a sharded model and, on rank 0, a whole one beside it."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD)
    model = get_peft_model(llama(), DoraConfig(r=4, target_modules="all-linear"))
    whole = copy.deepcopy(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    torch.manual_seed(1)
    ids = torch.randint(0, 100, (MICRO_BATCHES, 2 * WORLD, 8))
    refreshed = []
    for module in (norms.state, norms.shared):
        refresh = module._refresh
        module._refresh = lambda *args, refresh=refresh: (refreshed.append(args[0].name), refresh(*args))[1]
    optimizer, reference = optimizer_of(model), optimizer_of(whole)
    found = {"sharded": [], "whole": [], "refreshes": []}
    for _ in range(STEPS):
        refreshed.clear()
        for batch in ids:
            own = batch[2 * rank : 2 * rank + 2]
            loss = model(own, labels=own).loss
            (loss / MICRO_BATCHES).backward()
            mean = loss.detach() / WORLD
            dist.all_reduce(mean)
            found["sharded"].append(mean.item())
        found["refreshes"].append(sorted(refreshed))
        for batch in ids:
            loss = whole(batch, labels=batch).loss
            (loss / MICRO_BATCHES).backward()
            found["whole"].append(loss.item())
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    found["layers"] = sorted(m.name for m in model.modules() if hasattr(m, "lora_magnitude_vector"))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder / "adapter", state_dict=state, is_main_process=rank == 0)
    if rank == 0:
        with torch.no_grad():
            found["logits"] = whole(ids[0]).logits.tolist()
            loaded = PeftModel.from_pretrained(llama(), folder / "adapter")
            found["loaded"] = loaded(ids[0]).logits.tolist()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo and of imported libraries may ask for the interpreter while it is taken down, which then ends the
    # process by SIGABRT ("terminate called without an active exception"); seen once, in a run of the whole suite.
    os._exit(0)


@pytest.mark.distributed
def test_fsdp2_trains_as_one_process_with_one_refresh_a_step(tmp_path):
    mp.spawn(train_sharded, (tmp_path,), WORLD)
    for rank in range(WORLD):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["sharded"] == pytest.approx(found["whole"], rel=1e-5)
        assert found["sharded"][-1] < found["sharded"][0]
        assert len(found["layers"]) == 14
        for names in found["refreshes"]:
            assert names == found["layers"]
    found = json.loads((tmp_path / "0.json").read_text())
    torch.testing.assert_close(torch.tensor(found["loaded"]), torch.tensor(found["logits"]), rtol=1e-4, atol=1e-5)
