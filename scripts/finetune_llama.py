"""Fine-tune a LLaMA, or any causal language model of transformers, with DoRA, LoRA, PEFT's DoRA, or in full.

    python scripts/finetune_llama.py CONFIG.yaml [--field value ...]
    accelerate launch --config_file configs/accelerate/ddp.yaml scripts/finetune_llama.py configs/llama3_8b_r16.yaml

`configs/` holds the settings; `--help` lists the fields, each of which can be overridden on the command line. On a
laptop without GPU, with the model and the data of `scripts/prepare_smollm2.py` and `scripts/prepare_cmudict.py`:

    python scripts/finetune_llama.py configs/smollm2_135m.yaml --method dora --max_steps 60

Expected result: a falling loss, and in `output_dir` the adapter with its tokenizer, `loss.png`, `eval_results.json`,
`trainer_state.json` with every logged loss, and with `--merge` the folder `merged`. A run that was killed goes on from
its last checkpoint with `--resume_from_checkpoint true`, and its losses are those of a run that was not.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder
from transformers import set_seed

from finetune.checkpoints import (
    find_checkpoint,
    staged,
    whole_checkpoints,
)
from finetune.data import AnswerCollator, load_datasets
from finetune.model import build_model, count_parameters, load_tokenizer
from finetune.options import build_parser, parse_config
from finetune.trainer import AnswerTrainer, leave_process_group, training_arguments


def draw_loss(log_history: Sequence[dict[str, Any]], title: str) -> bytes:
    """The training and evaluation losses over the optimizer steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    try:
        config, _ = parse_config(argv, parser)
        checkpoint = find_checkpoint(config)
    except ValueError as error:
        parser.error(str(error))
    output_dir = Path(config.output_dir)
    args = training_arguments(config)
    is_main = args.process_index == 0
    say = print if is_main else lambda *_: None
    for name in config.unused_options():
        say(f"note: {name} has no meaning for method {config.method} and is not used")
    if is_main and config.push_to_hub:
        # Now rather than after hours of training: a missing token or a name that is taken shows here.
        create_repo(config.hub_model_id, exist_ok=True)

    tokenizer = load_tokenizer(config)
    with args.main_process_first(desc="tokenizing"):
        train_dataset, eval_dataset = load_datasets(config, tokenizer)
    set_seed(config.seed)
    model = build_model(config, tokenizer)
    num_trainable, num_all = count_parameters(model)
    say(f"{config.method}: {num_trainable:,} of {num_all:,} parameters are trained ({num_trainable / num_all:.2%})")
    say(f"{len(train_dataset)} sequences to train on, {len(eval_dataset or [])} to evaluate on")
    trainer = AnswerTrainer(
        model=model,
        args=args,
        data_collator=AnswerCollator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        lr_magnitude=config.lr_magnitude if config.method == "dora" else None,
    )
    if config.merge and trainer.is_fsdp_enabled:
        raise ValueError("merge: not possible on weights sharded by FSDP; merge the saved adapter in one process.")

    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    with whole_checkpoints(output_dir) if is_main else contextlib.nullcontext():
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Trainer turned the cache off for training; a saved model should generate with it.
    model.config.use_cache = True
    with staged(output_dir) if is_main else contextlib.nullcontext(output_dir) as folder:
        trainer.save_model(str(folder))
    model.config.use_cache = False
    history, last_step = trainer.state.log_history, trainer.state.global_step
    metrics = next((entry for entry in history if "eval_loss" in entry and entry["step"] == last_step), {})
    if eval_dataset is not None and not metrics:
        metrics = trainer.evaluate()
    leave_process_group(trainer)
    if not is_main:
        return

    metrics = metrics | {"train_loss": result.training_loss, "step": last_step}
    with staged(output_dir) as folder:
        folder.mkdir()
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "loss.png").write_bytes(draw_loss(trainer.state.log_history, f"{config.method}, {output_dir.name}"))
        (folder / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print("  ".join(f"{name} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if name in metrics))
    print(f"saved to {output_dir}")
    if config.merge and config.method != "full":
        with staged(output_dir / "merged") as folder:
            merged = model.merge_and_unload()
            merged.config.use_cache = True
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        print(f"merged model saved to {output_dir / 'merged'}")
    if config.push_to_hub:
        # training_args.bin holds local paths.
        private = ["checkpoint-*/*", "merged/*", "training_args.bin"]
        upload_folder(repo_id=config.hub_model_id, folder_path=output_dir, ignore_patterns=private)
        print(f"pushed to {config.hub_model_id}")


if __name__ == "__main__":
    main()
