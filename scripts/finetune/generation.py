"""Answers of a model with or without an adapter."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import dora_peft  # noqa: F401 - makes PEFT load the adapters that this package wrote as its own


def load_model(
    name_or_path: str, gguf_file: str | None, adapter: str | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a causal language model for generation, and the adapter on top of it if one is given.

    Args:
        name_or_path: a folder or a Hub id.
        gguf_file: the model's file inside `name_or_path` if it is in GGUF format.
        adapter: the folder or Hub id of a PEFT adapter.

    Returns:
        The model in evaluation mode, float32 on the CPU and bfloat16 on a GPU, and its tokenizer, which pads on the
        left.
    """
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, gguf_file=gguf_file, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        name_or_path, gguf_file=gguf_file, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Continue every prompt greedily up to the end-of-sequence token."""
    answers = []
    with tqdm(total=len(prompts), unit="word") as progress:
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
            batch = batch.to(model.device)
            tokens = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            new_tokens = tokens[:, batch["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            progress.update(len(new_tokens))
    return answers
