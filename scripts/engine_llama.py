"""llama.cpp itself: each form of an adapter through its converters, and the answers of its engine or what it refuses.

python scripts/engine_llama.py FOLDER      # as scripts/check_serving.py made it; .engines/llama as engines.sh made it

The converters are those of llama-cpp-python's source distribution, the engine is node-llama-cpp's (engine_llama.mjs).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import torch  # noqa: F401  for the converters, which are forks of this process
import transformers  # noqa: F401

ENGINE = Path(".engines/llama")
TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def convert(script: str, *words: str | Path) -> str | None:
    """Run a converter; None, or the line in which it says why it refuses."""
    with tempfile.TemporaryFile("w+") as log:
        # A fork of this process, which has imported what takes the converter's longest.
        ended = multiprocessing.get_context("fork").Process(target=run, args=(script, words, log.fileno()))
        ended.start()
        ended.join()
        if ended.exitcode == 0:
            return None
        log.seek(0)
        lines = [line for line in log if re.match(r"ERROR:|\w*(Error|Exception)\b", line)]
    if not lines:
        raise SystemExit(f"error: {script} {' '.join(map(str, words))} ended with {ended.exitcode}, and says nothing")
    return re.sub(r"^ERROR:[\w-]*:", "", lines[0].strip())


def run(script: str, words: tuple[str | Path, ...], log: int) -> None:
    """A converter as the command that it is, its messages in a file."""
    os.dup2(log, 2)
    folder = (ENGINE / "llama.cpp").resolve()
    sys.path.insert(0, str(folder))
    sys.argv = [script, *map(str, words)]
    runpy.run_path(str(folder / script), run_name="__main__")


def serve(folder: Path, models: dict, group: list[tuple[str, dict]]) -> tuple[dict[str, dict], dict[str, str]]:
    """The answers to cases that share a base and a dtype; files are removed, since they are as large as the models."""
    first, rows = group[0][1], {}
    kind, base = TYPES[first["dtype"]], folder / "base.gguf"
    refusal = convert("convert_hf_to_gguf.py", folder / first["base"], "--outtype", kind, "--outfile", base)
    if refusal is not None:
        return {name: {"refused": refusal} for name, _ in group}, {}
    asked = []
    for number, (name, case) in enumerate(group):
        # What is written as a file is llama.cpp's own; a folder goes through its converter.
        lora = folder / case["adapter"] if case["adapter"] is not None else None
        if lora is not None and lora.is_dir():
            lora = folder / f"{number}.gguf"
            options = ("--base", folder / case["base"], "--outtype", kind, "--outfile", lora)
            refusal = convert("convert_lora_to_gguf.py", folder / case["adapter"], *options)
            if refusal is not None:
                rows[name] = {"refused": refusal}
                continue
        asked.append({"name": name, "lora": lora and str(lora), **models[case["model"]]})
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps({"model": str(base), "asked": asked}))
    subprocess.run(["node", "scripts/engine_llama.mjs", ENGINE, request, answer], check=True)
    given = json.loads(answer.read_text(encoding="utf-8"))
    for path in (base, *folder.glob("[0-9]*.gguf")):
        path.unlink()
    return rows | given["rows"], given["versions"]


def main() -> None:
    folder = Path(sys.argv[1])
    if not (ENGINE / "llama.cpp").is_dir():
        raise SystemExit(f"error: no {ENGINE}/llama.cpp: bash scripts/engines.sh serve llama makes it")
    plan = json.loads((folder / "cases.json").read_text(encoding="utf-8"))

    cases = [(name, case) for name, case in plan["cases"].items() if "llama" in case["engines"]]

    def engine(item: tuple[str, dict]) -> tuple[str, str]:
        return item[1]["base"], item[1]["dtype"]

    rows: dict[str, dict] = {}
    versions: dict[str, str] = {}
    for _, group in groupby(sorted(cases, key=engine), key=engine):
        answers, found = serve(folder, plan["models"], list(group))
        rows |= answers
        versions |= found
    (folder / "llama.json").write_text(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
