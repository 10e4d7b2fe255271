"""SGLang's own check of an adapter's configuration, which needs no GPU: each form that holds an adapter.

python scripts/engine_sglang.py FOLDER      # as scripts/check_serving.py made it
"""

import importlib.metadata
import json
import sys
from pathlib import Path

from engines.sglang_checks import check


def main() -> None:
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    rows = {}
    for name, case in plan["cases"].items():
        if "sglang" in case["engines"]:
            try:
                rows[name] = check(folder / case["adapter"], set(plan["models"][case["model"]]["modules"]))
            except ValueError as error:
                rows[name] = {"refused": str(error).splitlines()[0]}
    versions = {"SGLang": importlib.metadata.version("sglang")}
    (folder / "sglang.json").write_text(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
