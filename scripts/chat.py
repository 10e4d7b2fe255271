"""Talk to a model with a saved adapter: a conversation of given lines, or an interactive one.

    python scripts/chat.py --model_name_or_path data/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf \\
        --adapter outputs/demo/dora --task spelling --compare --say window --say kitchen

Runs on a GPU if there is one, and as it stands on the CPU. Expected result: for every word that is said, the
phonemes that the model answers (`W IH N D OW`), and with `--compare` what it answers without the adapter. Without
`--say` the words are read from the keyboard, up to an empty line.

`--task chat`, the default, is for adapters trained on conversations: it keeps the turns so far and puts them through
the tokenizer's chat template. `--task spelling` asks every word in the format of `prepare_cmudict.py`, as in training.
"""

import argparse
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.generation import load_model
from prepare.records import format_prompt

Message = dict[str, str]


def read_lines(given: list[str] | None) -> Iterator[str]:
    """The user's lines: those given, or those typed up to an empty line or the end of the input."""
    if given:
        yield from given
        return
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def build_prompt(task: str, history: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model continues: the last line as a spelling prompt, or the whole conversation.

    Raises:
        ValueError: the conversation needs a chat template and the tokenizer has none.
    """
    if task == "spelling":
        return format_prompt(history[-1]["content"].lower())
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template; use a chat model, or --task spelling for the demo's adapters"
        )
    return tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def answer(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> str:
    """Continue the prompt greedily up to the end-of-sequence token."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--gguf_file")
    parser.add_argument("--adapter", required=True, help="folder or Hub id")
    parser.add_argument("--task", choices=["chat", "spelling"], default="chat")
    parser.add_argument("--say", action="append", metavar="LINE", help="a line of the conversation; may be repeated")
    parser.add_argument("--compare", action="store_true", help="also show the answers without the adapter")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model_name_or_path, args.gguf_file, args.adapter)
    history: list[Message] = []
    for line in read_lines(args.say):
        history.append({"role": "user", "content": line})
        prompt = build_prompt(args.task, history, tokenizer)
        reply = answer(model, tokenizer, prompt, args.max_new_tokens)
        history.append({"role": "assistant", "content": reply})
        print(f"\nyou:             {line}\nmodel:           {reply}", flush=True)
        if args.compare:
            with model.disable_adapter():
                plain_reply = answer(model, tokenizer, prompt, args.max_new_tokens)
            print(f"without adapter: {' '.join(plain_reply.split())}", flush=True)


if __name__ == "__main__":
    main()
