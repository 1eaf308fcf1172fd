"""Writes recorded.json: what the files beside it must give, and on which processor."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from test_golden import processor

ASKED = ("--prompt", "ROMEO:", "--max-new-tokens", "100", "--temperature", "0.7", "--seed", "1")


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()


def text_of(dataset: Path) -> str:
    """The sha256 of the documents of the training split, with a zero byte after each."""
    out = Path("documents.jsonl")
    said("hourglass", "data", "export-text", str(dataset), "--out", str(out))
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    out.unlink()
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()


def said_by(export: Path) -> dict[str, str]:
    score = said("hourglass", "evaluate", str(export), "--data", "data/bytes")
    text = said("hourglass", "generate", str(export), *ASKED)
    return {"text": text, "score": score.partition(": ")[2].strip()}


recorded = {
    "processor": processor(),
    "data": {dataset.name: text_of(dataset) for dataset in sorted(Path("data").iterdir())},
    "asked": ASKED,
    "exports": {export.name: said_by(export) for export in sorted(Path("exports").iterdir())},
}
Path("recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")
