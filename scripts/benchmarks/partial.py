"""What a benchmark has measured before it was ended, so that another call goes on from there."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from common.files import digest, write_json

ROOT = RESULTS.parents[2]


class Partial:
    """The results of one run so far, in a file beside the one that it will write, with the suffix `.partial`.

    Args:
        path: Of the whole result.
        options, machine: What the run is of, and on. Another machine, other versions or other options begin anew.
        resume: Whether to begin with what the file has.

    Attributes:
        results: What is measured; a run of the same options does not measure it again.
        skipped: The contenders that could not run, with the reason.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], machine: Mapping[str, Any], resume: bool) -> None:
        self.path = path.with_suffix(".partial") if resume else None
        self.results: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        sources = [*(ROOT / "dora_peft").rglob("*.py"), *(ROOT / "scripts" / "benchmarks").glob("*.py")]
        self.key = {
            "files": digest(*sorted(sources)),
            "options": dict(options),
            "machine": {name: machine[name] for name in ("device", "processor", "threads", "python", "versions")},
        }
        if self.path is not None and self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["key"] == json.loads(json.dumps(self.key)):
                self.results, self.skipped = stored["results"], stored["skipped"]
                print(f"{self.path.name}: {len(self.results)} results of an earlier call are kept", flush=True)

    def add(self, result: dict[str, Any]) -> None:
        """Store one more, unless it comes from the file."""
        if self.path is not None and not any(result is known for known in self.results):

            def place(other: Mapping[str, Any]) -> tuple[str, str]:
                return other["quantity"], json.dumps(other["setting"], sort_keys=True)

            # one that stood alone, of a setting whose other quantities were missing, is measured again
            self.results[:] = [other for other in self.results if place(other) != place(result)] + [result]
            write_json(self.path, {"key": self.key, "results": self.results, "skipped": self.skipped})

    def end(self) -> None:
        """The whole result is stored."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def known_results(options: Namespace, setting: Mapping[str, Any], *quantities: str) -> Iterator[dict[str, Any]]:
    """The results that an earlier call measured of these quantities at this setting, all of them or none."""
    asked = json.loads(json.dumps(dict(setting)))
    found = [result for result in getattr(options, "known", ()) if result["setting"] == asked]
    found = [result for result in found if result["quantity"] in quantities]
    if {result["quantity"] for result in found} == set(quantities):
        yield from found
